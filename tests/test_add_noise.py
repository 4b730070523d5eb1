"""`add_noise` on every backend: against the float64 definition, layouts, invariances, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from guda_fast import ops, reference
from guda_fast.errors import BackendUnavailableError

MakeRows = Callable[..., tuple[Tensor, ...]]

NORMAL_TOLERANCE = 4e-6  # the noise contract's
UNIT = 2.0**-24  # a float32 rounding

SHAPES = [(1,), (2,), (3,), (5,), (17,), (4095,), (4097,), (3, 7, 5), (1, 1, 1, 1), (2, 3, 4, 5), (3, 32, 32)]


def assert_within_tolerance(result: Tensor, rows: tuple[Tensor, ...], **draw: object) -> None:
    """|x_t - exact| <= |b| 4e-6 + two roundings of each of a x0 and b eps (the product, and the sum)."""
    exact = reference.add_noise(*rows, **draw, dtype=torch.float64)  # type: ignore[arg-type]
    x0, index, *_, x0_scale, eps_scale = rows
    column = (-1,) + (1,) * (x0.dim() - 1)
    signal = (x0[index] * x0_scale.view(column)).double()
    eps = exact - signal
    bound = eps_scale.view(column).abs() * NORMAL_TOLERANCE + 2.1 * UNIT * (signal.abs() + eps.abs())
    assert result.shape == exact.shape
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("antithetic", [False, True])
def test_agrees_with_the_float64_definition(
    backend: str, make_rows: MakeRows, shape: tuple[int, ...], antithetic: bool
) -> None:
    rows = make_rows(7, shape)
    out = torch.full((7, *shape), torch.nan)
    result = ops.add_noise(*rows, seed=2**64 - 1, antithetic=antithetic, out=out)
    assert result is out
    assert_within_tolerance(result, rows, seed=2**64 - 1, antithetic=antithetic)
    fresh = ops.add_noise(*rows, seed=2**64 - 1, antithetic=antithetic)
    assert fresh.is_contiguous()
    assert torch.equal(fresh, out)


@pytest.mark.parametrize(
    ("queries", "rows", "shape"), [(3, 0, (2, 3)), (0, 0, (2, 3)), (3, 4, (0,)), (3, 4, (2, 0, 5))]
)
def test_empty(backend: str, make_rows: MakeRows, queries: int, rows: int, shape: tuple[int, ...]) -> None:
    tensors = make_rows(rows, shape, queries=max(queries, 1))
    result = ops.add_noise(tensors[0][:queries], *tensors[1:], seed=0)
    assert result.shape == (rows, *shape)


def test_layouts_change_nothing(backend: str, make_rows: MakeRows) -> None:
    rows = make_rows(9, (3, 6, 5))
    x0, vectors = rows[0], rows[1:]
    expected = ops.add_noise(*rows, seed=4)
    strided_x0 = {
        "channels last": x0.to(memory_format=torch.channels_last),
        "transposed": x0.transpose(2, 3).contiguous().transpose(2, 3),
        "every second": torch.stack((x0, x0 * torch.nan), dim=-1).flatten(-2)[..., ::2],
        "three of six channels": torch.cat((x0, x0 * torch.nan), dim=1)[:, :3],
    }
    for name, view in strided_x0.items():
        assert not view.is_contiguous(), name
        assert torch.equal(ops.add_noise(view, *vectors, seed=4), expected), name
    strided_out = {
        "channels last": torch.full((9, 5, 6, 3), torch.nan).permute(0, 3, 2, 1),
        "three of six channels": torch.full((9, 6, 6, 5), torch.nan)[:, 3:],
        "rows last": torch.full((3, 6, 5, 9), torch.nan).permute(3, 0, 1, 2),
        "every second row": torch.full((18, 3, 6, 5), torch.nan)[::2],
    }
    for name, view in strided_out.items():
        assert torch.equal(ops.add_noise(*rows, seed=4, out=view), expected), name
    padded = torch.full((9, 6, 6, 5), torch.nan)
    ops.add_noise(*rows, seed=4, out=padded[:, 3:])
    assert padded[:, :3].isnan().all(), "wrote outside the view"
    spread = [torch.stack((vector, vector), dim=1)[:, 0] for vector in vectors]
    assert torch.equal(ops.add_noise(x0, *spread, seed=4), expected)
    constant = torch.ones(1, 1, 1, 1).expand(3, 3, 6, 5)
    assert torch.equal(
        ops.add_noise(constant, *vectors, seed=4), ops.add_noise(constant.contiguous(), *vectors, seed=4)
    )


@st.composite
def views(draw: st.DrawFn, dims: int) -> tuple[tuple[int, ...], list[int], list[int]]:
    """A shape, an order of its dimensions in memory, and a step for each."""
    shape = tuple(draw(st.integers(1, 9)) for _ in range(dims))
    return (shape, draw(st.permutations(range(dims))), [draw(st.integers(1, 3)) for _ in range(dims)])


def laid_out(values: Tensor, order: list[int], steps: list[int]) -> Tensor:
    """The same values in another memory order, with NaN between them."""
    memory = torch.full([values.shape[d] * steps[d] for d in order], torch.nan)
    view = memory.permute([order.index(d) for d in range(values.dim())])
    view = view[tuple(slice(None, None, step) for step in steps)]
    return view.copy_(values)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), dims=st.integers(1, 4), rows=st.integers(0, 5))
def test_any_strides(backend: str, make_rows: MakeRows, data: st.DataObject, dims: int, rows: int) -> None:
    (_, *shape), order, steps = data.draw(views(dims + 1))
    tensors = make_rows(rows, tuple(shape))
    expected = ops.add_noise(*tensors, seed=1)
    x0 = laid_out(tensors[0], order, steps)
    _, order, steps = data.draw(views(dims + 1))
    out = laid_out(torch.zeros(rows, *shape), order, steps)
    assert torch.equal(ops.add_noise(x0, *tensors[1:], seed=1, out=out), expected)


def test_offsets_beyond_32_bits(backend: str, make_rows: MakeRows) -> None:
    rows = make_rows(4, (6,), queries=2)
    expected = ops.add_noise(*rows, seed=1)
    far = torch.empty(2**31 + 16)  # eight GiB of addresses; only the pages that are touched take memory
    x0 = far.as_strided((2, 6), (2**31, 1))
    x0.copy_(rows[0])
    assert torch.equal(ops.add_noise(x0, *rows[1:], seed=1), expected)
    out = far.as_strided((4, 6), (2**29, 2)).fill_(torch.nan)
    assert torch.equal(ops.add_noise(*rows, seed=1, out=out), expected)


def test_row_order_splits_and_threads_change_no_bit(backend: str, make_rows: MakeRows) -> None:
    rows = make_rows(37, (3, 20, 41))
    expected = ops.add_noise(*rows, seed=8)
    x0, vectors = rows[0], rows[1:]
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ops.add_noise(x0, *(v[order] for v in vectors), seed=8), expected[order])
    split = [ops.add_noise(x0, *parts, seed=8) for parts in zip(*(v.split(10) for v in vectors), strict=True)]
    assert torch.equal(torch.cat(split), expected)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.add_noise(*rows, seed=8), expected)
    finally:
        torch.set_num_threads(before)


def test_a_zero_scale_never_reads_the_query(backend: str, make_rows: MakeRows) -> None:
    x0, index, query_id, timestep, sample, x0_scale, eps_scale = make_rows(8, (3, 5))
    x0_scale[::2] = 0
    spoiled = torch.full_like(x0, torch.nan)
    clean = ops.add_noise(x0, index, query_id, timestep, sample, x0_scale, eps_scale, seed=1)
    result = ops.add_noise(spoiled, index, query_id, timestep, sample, x0_scale, eps_scale, seed=1)
    assert torch.equal(result[::2], clean[::2])
    assert result[1::2].isnan().all()


def test_extreme_values_pass_through(backend: str, make_rows: MakeRows) -> None:
    x0, index, query_id, timestep, sample, x0_scale, eps_scale = make_rows(4, (4,), queries=1)
    x0[0] = torch.tensor([torch.inf, -torch.inf, 3e38, 1e-40])
    result = ops.add_noise(x0, index, query_id, timestep, sample, x0_scale * 0 + 1, eps_scale * 0, seed=1)
    assert torch.equal(result, x0.expand(4, 4))


def test_float64_is_computed_in_float64_by_the_reference(make_rows: MakeRows) -> None:
    rows = make_rows(5, (3, 7), dtype=torch.float64)
    result = ops.add_noise(*rows, seed=2)
    assert result.dtype == torch.float64
    x0, index, query_id, timestep, sample, x0_scale, eps_scale = rows
    eps = reference.standard_normals(query_id, timestep, sample, 21, seed=2, dtype=torch.float64)
    expected = x0_scale[:, None] * x0[index].flatten(1) + eps_scale[:, None] * eps
    torch.testing.assert_close(result.flatten(1), expected, rtol=2**-51, atol=2**-51)
    with pytest.raises(BackendUnavailableError, match=r"add_noise: backend asked by backend= cannot run: cpp: "):
        ops.add_noise(*rows, seed=2, backend="cpp")


def test_results_carry_no_gradient(backend: str, make_rows: MakeRows) -> None:
    x0, *vectors = make_rows(3, (5,))
    assert not ops.add_noise(x0.requires_grad_(), *vectors, seed=0).requires_grad


def test_a_lazily_negated_view_is_read_right(make_rows: MakeRows) -> None:
    x0, *vectors = make_rows(3, (5,))
    negated = torch.complex(x0, -x0).conj().imag
    assert negated.is_neg()
    expected = ops.add_noise(x0, *vectors, seed=0, backend="reference")
    assert torch.equal(ops.add_noise(negated, *vectors, seed=0), expected)


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made under it held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (
                    torch.multiprocessing.reductions.StorageWeakRef(storage),
                    storage.nbytes(),
                )
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


@pytest.mark.parametrize(("rows", "shape"), [(1024, (3, 16, 16)), (1, (700_001,))])
def test_reference_memory_is_bounded(make_rows: MakeRows, rows: int, shape: tuple[int, ...]) -> None:
    tensors = make_rows(rows, shape, queries=1)
    out = torch.empty(rows, *shape)
    with PeakMemory() as memory:
        reference.add_noise(*tensors, seed=0, out=out)
    assert 2**20 < memory.peak < 64 * 2**20


VALID = {
    "x0": torch.zeros(2, 3, 4),
    "query_index": torch.tensor([0, 1, 1]),
    "query_id": torch.tensor([5, 6, 6]),
    "timestep": torch.tensor([0, 9, 65535]),
    "sample": torch.tensor([0, 1, 65535]),
    "x0_scale": torch.ones(3),
    "eps_scale": torch.ones(3),
    "seed": 0,
}

INVALID = [
    ("x0", [[1.0]], TypeError, r"add_noise: x0 must be a torch.Tensor, got \[\[1.0\]\] \(list\)"),
    ("x0", torch.zeros(2), ValueError, r"x0 must have at least 2 dimensions, got float32 tensor"),
    ("x0", torch.zeros(1, 1, 1, 1, 1, 1), ValueError, r"x0 must have at most 5 dimensions"),
    ("x0", torch.zeros(2, 3).half(), TypeError, r"x0 must be float32 or float64, got float16 tensor"),
    ("x0", torch.zeros(0, 3, 4), ValueError, r"query_index must be in \[0, 0\), got 0 at row 0"),
    ("query_index", torch.zeros(3), TypeError, r"query_index must be int64, got float32"),
    ("query_index", torch.zeros(3, 1).long(), ValueError, r"query_index must have shape \(\*,\), got int64"),
    ("query_index", torch.tensor([0, 2, 0]), ValueError, r"query_index .* in \[0, 2\), got 2 at row 1"),
    ("query_index", torch.tensor([0, 0, -1]), ValueError, r"query_index .* in \[0, 2\), got -1 at row 2"),
    ("query_id", torch.tensor([5, 6]), ValueError, r"query_id must have shape \(3,\), got .* \(2,\)"),
    ("query_id", torch.tensor([5, 6, 6]).int(), TypeError, r"query_id must be int64, got int32"),
    ("timestep", torch.tensor([0, 65536, 0]), ValueError, r"timestep .* in \[0, 65536\), got 65536 at row 1"),
    ("timestep", torch.tensor([-1, 0, 0]), ValueError, r"timestep .* in \[0, 65536\), got -1 at row 0"),
    ("sample", torch.tensor([0, 0, 70000]), ValueError, r"sample .* in \[0, 65536\), got 70000 at row 2"),
    ("sample", torch.zeros(3, device="meta").long(), ValueError, r"sample must be on cpu, got .* on meta"),
    ("x0_scale", torch.ones(3).double(), TypeError, r"x0_scale must be float32, got float64"),
    ("eps_scale", 1.0, TypeError, r"eps_scale must be a torch.Tensor, got 1.0 \(float\)"),
    ("seed", -1, ValueError, r"seed must be between 0 and 18446744073709551615, got -1"),
    ("seed", 2**64, ValueError, r"seed must be between 0 and 18446744073709551615, got 18446744073709551616"),
    ("seed", 1.0, TypeError, r"seed must be an integer, got 1.0 \(float\)"),
    ("antithetic", 1, TypeError, r"antithetic must be a bool, got 1 \(int\)"),
    ("out", torch.zeros(3, 3), ValueError, r"out must have shape \(3, 3, 4\), got float32"),
    ("out", torch.zeros(3, 3, 4).half(), TypeError, r"out must be float32, got float16"),
    ("out", torch.zeros(3, 3, 4, device="meta"), ValueError, r"out must be on cpu, got"),
    ("out", torch.zeros(3, 1, 4).expand(3, 3, 4), ValueError, r"out must not overlap itself, got strides"),
    ("backend", "fpga", ValueError, r"backend must be one of 'auto', 'cpp', .*'reference', got 'fpga'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "message"), INVALID)
def test_invalid_arguments(name: str, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"add_noise: .*{message.removeprefix('add_noise: ')}"):
        ops.add_noise(**{**VALID, name: value})


def test_out_must_not_be_the_query(make_rows: MakeRows) -> None:
    rows = make_rows(3, (4,))
    before = rows[0].clone()
    with pytest.raises(ValueError, match="out must not share memory with x0"):
        ops.add_noise(*rows, seed=0, out=rows[0])
    assert torch.equal(rows[0], before)


def test_out_shares_no_memory_with_a_vector(make_rows: MakeRows) -> None:
    x0, *vectors = make_rows(3, (4,))
    memory = torch.ones(12)
    vectors[5] = memory[:3]
    with pytest.raises(ValueError, match="add_noise: out must not share memory with eps_scale, got overlapping"):
        ops.add_noise(x0, *vectors, seed=0, out=memory.view(3, 4))
