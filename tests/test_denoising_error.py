"""`denoising_error` on every backend: against its float64 definition, layouts, invariances, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from guda_fast import ops, reference
from guda_fast.errors import BackendUnavailableError

MakeRows = Callable[..., tuple[Tensor, ...]]

NORMAL_TOLERANCE = 4e-6  # the noise contract's
UNIT = 2.0**-24  # a float32 rounding
SUM_UNIT = 2.0**-53  # a float64 rounding

SHAPES = [(1,), (2,), (3,), (5,), (17,), (4095,), (4097,), (3, 7, 5), (1, 1, 1, 1), (2, 3, 4, 5), (3, 64, 65)]


def make_predictions(models: int, rows: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(models)
    return torch.randn((models, rows, *shape), generator=random).to(dtype)


def make_weight(rows: int) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 3


def target_bound(rows: tuple[Tensor, ...], exact: Tensor) -> Tensor:
    """How far a float32 target may lie from the exact one: as for add_noise."""
    x0, index, *_, x0_scale, eps_scale = rows
    signal = (x0_scale[:, None] * x0[index].flatten(1)).double()
    noise = exact - signal
    return eps_scale[:, None].abs() * NORMAL_TOLERANCE + 2.1 * UNIT * (signal.abs() + noise.abs())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("antithetic", [False, True])
def test_agrees_with_the_float64_definition(
    backend: str, make_rows: MakeRows, shape: tuple[int, ...], antithetic: bool
) -> None:
    draw = {"seed": 2**63 + 7, "antithetic": antithetic}
    rows, weight, predictions = (make_rows(6, shape), make_weight(6), make_predictions(4, 6, shape))
    result = ops.denoising_error(predictions, *rows, weight, **draw, paired=True)
    exact = reference.denoising_error(predictions, *rows, weight, **draw, paired=True, dtype=torch.float64)
    target = reference.add_noise(*rows, **draw, dtype=torch.float64).flatten(1)
    bound = target_bound(rows, target)
    p = predictions.double().flatten(2)
    difference = (p - target).abs()
    off = bound + UNIT * difference  # of p - target, after its own rounding
    square = (2 * difference * off + off**2).sum(-1) * weight
    assert result.errors.dtype == torch.float64
    assert ((result.errors - exact.errors).abs() <= square + 1e-13 * exact.errors).all()
    # Paired: p_m - p_0 is rounded once; the other factor is off by both targets and by four roundings.
    step = (p - p[:1]).abs()
    total = (p + p[:1] - 2 * target).abs()
    off = 2 * bound + 4 * UNIT * (p.abs() + p[:1].abs() + 2 * target.abs())
    product = (step * off * (1 + UNIT) + UNIT * step * total).sum(-1) * weight
    assert result.paired is not None
    assert exact.paired is not None
    assert ((result.paired - exact.paired).abs() <= product + 1e-13 * square).all()
    assert (result.paired[0] == 0).all()
    assert ops.denoising_error(predictions, *rows, weight, **draw).paired is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (4097,), (3, 7, 5)])
def test_equals_the_sum_over_the_ops_own_target(
    backend: str, make_rows: MakeRows, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """float32 differences and float64 squares are exact, so only the order of the sum is left to differ."""
    rows, weight, predictions = (make_rows(6, shape), make_weight(6), make_predictions(3, 6, shape, dtype))
    target = ops.add_noise(*rows, seed=5)
    error = (predictions.float() - target).double().flatten(2)
    expected = weight * (error * error).sum(-1)
    result = ops.denoising_error(predictions, *rows, weight, seed=5)
    relative = 2 * error.shape[-1] * SUM_UNIT
    assert ((result.errors - expected).abs() <= relative * expected).all()


def test_paired_differences_survive_where_errors_cancel(backend: str, make_rows: MakeRows) -> None:
    shape = (3, 32, 32)
    rows, weight = make_rows(8, shape), torch.ones(8, dtype=torch.float64)
    base = make_predictions(1, 8, shape)
    predictions = torch.cat((base, base + 1e-5 * make_predictions(2, 8, shape)))
    result = ops.denoising_error(predictions, *rows, weight, seed=5, paired=True)
    target = ops.add_noise(*rows, seed=5).double()
    p = predictions.double()
    exact = ((p - p[:1]) * (p + p[:1] - 2 * target)).flatten(2).sum(-1)
    assert result.paired is not None
    paired_off = (result.paired - exact)[1:].norm()
    plain_off = (result.errors - result.errors[:1] - exact)[1:].norm()
    # Rounding of the plain form scales with the error, that of the paired form with the step of 1e-5.
    assert paired_off < 1e-3 * plain_off


@pytest.mark.parametrize(
    ("models", "queries", "rows", "shape"),
    [
        (2, 3, 0, (4,)),
        (2, 0, 0, (4,)),
        (2, 3, 4, (0,)),
        (2, 3, 4, (2, 0, 5)),
        (0, 3, 4, (5,)),
        (0, 0, 0, (0,)),
    ],
)
@pytest.mark.parametrize("paired", [False, True])
def test_empty(
    backend: str,
    make_rows: MakeRows,
    models: int,
    queries: int,
    rows: int,
    shape: tuple[int, ...],
    paired: bool,
) -> None:
    tensors = make_rows(rows, shape, queries=max(queries, 1))
    predictions = make_predictions(models, rows, shape)
    result = ops.denoising_error(
        predictions, tensors[0][:queries], *tensors[1:], make_weight(rows), seed=0, paired=paired
    )
    assert torch.equal(result.errors, torch.zeros(models, rows, dtype=torch.float64))
    if paired:
        assert torch.equal(result.paired, result.errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layouts_change_nothing(backend: str, make_rows: MakeRows, dtype: torch.dtype) -> None:
    rows, weight = make_rows(9, (3, 6, 5)), make_weight(9)
    predictions = make_predictions(2, 9, (3, 6, 5), dtype)
    expected = ops.denoising_error(predictions, *rows, weight, seed=4, paired=True)
    views = {
        "channels last": predictions.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
        "three of six channels": torch.cat((predictions, predictions * torch.nan), dim=2)[:, :, :3],
        "rows first": predictions.transpose(0, 1).contiguous().transpose(0, 1),
        "every second": torch.stack((predictions, predictions * torch.nan), dim=-1).flatten(-2)[..., ::2],
        "last six of seven rows": torch.cat((predictions[:, :1] * torch.nan, predictions), dim=1)[:, 1:],
    }
    for name, view in views.items():
        assert not view.is_contiguous(), name
        result = ops.denoising_error(view, *rows, weight, seed=4, paired=True)
        assert torch.equal(result.errors, expected.errors), name
        assert torch.equal(result.paired, expected.paired), name
    same = predictions[:1, :1].expand(3, 9, 3, 6, 5)
    expanded = ops.denoising_error(same, *rows, weight, seed=4, paired=True)
    copied = ops.denoising_error(same.contiguous(), *rows, weight, seed=4, paired=True)
    assert torch.equal(expanded.errors, copied.errors)
    assert (expanded.paired == 0).all()
    spread = [torch.stack((vector, vector), dim=1)[:, 0] for vector in (*rows[1:], weight)]
    assert torch.equal(ops.denoising_error(predictions, rows[0], *spread, seed=4).errors, expected.errors)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    data=st.data(),
    dims=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_strides(backend: str, make_rows: MakeRows, data: st.DataObject, dims: int, dtype: torch.dtype) -> None:
    sizes = [data.draw(st.integers(1, 7)) for _ in range(dims + 2)]
    order = data.draw(st.permutations(range(dims + 2)))
    steps = [data.draw(st.integers(1, 3)) for _ in sizes]
    models, count, *shape = sizes
    rows, predictions = (make_rows(count, tuple(shape)), make_predictions(models, count, tuple(shape), dtype))
    memory = torch.full([sizes[d] * steps[d] for d in order], torch.nan, dtype=dtype)
    view = memory.permute([order.index(d) for d in range(dims + 2)])
    view = view[tuple(slice(None, None, step) for step in steps)].copy_(predictions)
    expected = ops.denoising_error(predictions, *rows, make_weight(count), seed=1, paired=True)
    result = ops.denoising_error(view, *rows, make_weight(count), seed=1, paired=True)
    assert torch.equal(result.errors, expected.errors)
    assert torch.equal(result.paired, expected.paired)


def test_row_order_splits_models_and_threads_change_no_bit(backend: str, make_rows: MakeRows) -> None:
    shape = (3, 20, 41)
    rows, weight, predictions = (make_rows(23, shape), make_weight(23), make_predictions(3, 23, shape))
    x0, vectors = rows[0], (*rows[1:], weight)
    expected = ops.denoising_error(predictions, *rows, weight, seed=8, paired=True)
    assert expected.paired is not None

    def assert_same(result: ops.DenoisingError, models: slice, part: slice | Tensor) -> None:
        assert torch.equal(result.errors, expected.errors[models, part])
        assert torch.equal(result.paired, expected.paired[models, part])

    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    for part in (order, slice(0, 1), slice(1, 2), slice(1, 12), slice(12, 23)):
        some = ops.denoising_error(predictions[:, part], x0, *(v[part] for v in vectors), seed=8, paired=True)
        assert_same(some, slice(None), part)
    assert_same(ops.denoising_error(predictions[:2], *rows, weight, seed=8, paired=True), slice(2), slice(None))
    alone = ops.denoising_error(predictions[1:2], *rows, weight, seed=8)
    assert torch.equal(alone.errors, expected.errors[1:2])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            again = ops.denoising_error(predictions, *rows, weight, seed=8, paired=True)
            assert_same(again, slice(None), slice(None))
    finally:
        torch.set_num_threads(before)


def test_a_long_row_is_the_same_for_any_number_of_threads(backend: str, make_rows: MakeRows) -> None:
    shape = (70_001,)
    rows, weight, predictions = (make_rows(1, shape), make_weight(1), make_predictions(1, 1, shape))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.denoising_error(predictions, *rows, weight, seed=8).errors)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_offsets_beyond_32_bits(backend: str, make_rows: MakeRows) -> None:
    rows, weight, predictions = (make_rows(2, (6,)), make_weight(2), make_predictions(3, 2, (6,)))
    expected = ops.denoising_error(predictions, *rows, weight, seed=1)
    far = torch.empty(2**31 + 64)  # eight GiB of addresses; only the pages that are touched take memory
    view = far.as_strided((3, 2, 6), (2**30, 32, 1)).copy_(predictions)
    assert torch.equal(ops.denoising_error(view, *rows, weight, seed=1).errors, expected.errors)


def test_a_zero_scale_never_reads_the_query(backend: str, make_rows: MakeRows) -> None:
    x0, *vectors = make_rows(8, (3, 5))
    vectors[4][::2] = 0
    weight, predictions = make_weight(8), make_predictions(2, 8, (3, 5))
    clean = ops.denoising_error(predictions, x0, *vectors, weight, seed=1).errors
    result = ops.denoising_error(predictions, x0 * torch.nan, *vectors, weight, seed=1).errors
    assert torch.equal(result[:, ::2], clean[:, ::2])
    assert result[:, 1::2].isnan().all()


def test_what_is_not_a_number_stays_in_its_cell(backend: str, make_rows: MakeRows) -> None:
    rows, weight, predictions = (make_rows(3, (70,)), make_weight(3), make_predictions(3, 3, (70,)))
    clean = ops.denoising_error(predictions, *rows, weight, seed=1).errors
    predictions[1, 2, 69], predictions[2, 0, 0] = torch.nan, torch.inf
    result = ops.denoising_error(predictions, *rows, weight, seed=1).errors
    assert result[1, 2].isnan()
    assert result[2, 0].isinf()
    clean[1, 2] = clean[2, 0] = result[1, 2] = result[2, 0] = 0
    assert torch.equal(result, clean)


def test_every_half_precision_value_is_widened_exactly(backend: str) -> None:
    index, one = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        values = values[values.isfinite()].view(1, -1, 1)
        rows = values.shape[1]
        zeros = index.expand(rows)
        result = ops.denoising_error(
            values, torch.zeros(1, 1), zeros, zeros, zeros, zeros, one.expand(rows), (0 * one).expand(rows),
            one.double().expand(rows), seed=0,
        )  # fmt: skip
        assert torch.equal(result.errors[0], values.double().square().flatten())


def test_float64_is_computed_in_float64_by_the_reference(make_rows: MakeRows) -> None:
    rows, weight = make_rows(5, (3, 7), dtype=torch.float64), make_weight(5)
    predictions = make_predictions(2, 5, (3, 7)).double() + 1e-9
    target = ops.add_noise(*rows, seed=2)
    result = ops.denoising_error(predictions, *rows, weight, seed=2)
    expected = weight * (predictions - target).square().flatten(2).sum(-1)
    torch.testing.assert_close(result.errors, expected, rtol=40 * SUM_UNIT, atol=0)
    mixed = ops.denoising_error(predictions.float(), *rows, weight, seed=2)
    expected = weight * (predictions.float().double() - target).square().flatten(2).sum(-1)
    torch.testing.assert_close(mixed.errors, expected, rtol=40 * SUM_UNIT, atol=0)
    with pytest.raises(BackendUnavailableError, match=r"denoising_error: backend asked by backend= cannot run: cpp"):
        ops.denoising_error(predictions, *rows, weight, seed=2, backend="cpp")


def test_results_carry_no_gradient(backend: str, make_rows: MakeRows) -> None:
    predictions = make_predictions(1, 3, (5,)).requires_grad_()
    assert not ops.denoising_error(predictions, *make_rows(3, (5,)), make_weight(3), seed=0).errors.requires_grad


def valid() -> dict[str, object]:
    names = ("x0", "query_index", "query_id", "timestep", "sample", "x0_scale", "eps_scale")
    index, ones = torch.zeros(3, dtype=torch.int64), torch.ones(3)
    rows = dict(zip(names, (torch.zeros(2, 4), index, index, index, index, ones, ones), strict=True))
    return {**rows, "predictions": torch.zeros(2, 3, 4), "weight": ones.double(), "seed": 0}


INVALID = [
    ("predictions", None, TypeError, r"predictions must be a torch.Tensor, got None"),
    ("predictions", torch.zeros(3, 4), ValueError, r"predictions must have shape \(\*, 3, 4\), got"),
    ("predictions", torch.zeros(2, 4, 4), ValueError, r"predictions must have shape \(\*, 3, 4\)"),
    ("predictions", torch.zeros(2, 3, 8), ValueError, r"predictions must have shape \(\*, 3, 4\)"),
    ("predictions", torch.zeros(2, 3, 4).double(), TypeError, r"predictions .* float16, got float64"),
    ("predictions", torch.zeros(2, 3, 4).long(), TypeError, r"predictions must be float32 or .* got int64"),
    ("predictions", torch.zeros(2, 3, 4, device="meta"), ValueError, r"predictions must be on cpu, got"),
    ("weight", torch.ones(3), TypeError, r"weight must be float64, got float32"),
    ("weight", torch.ones(2).double(), ValueError, r"weight must have shape \(3,\)"),
    ("x0", torch.zeros(4), ValueError, r"x0 must have at least 2 dimensions"),
    ("query_index", torch.tensor([0, 0, 2]), ValueError, r"query_index must be in \[0, 2\), got 2 at row 2"),
    ("timestep", torch.tensor([0, 0, 65536]), ValueError, r"timestep .* in \[0, 65536\), got 65536 at row 2"),
    ("sample", torch.tensor([0, -7, 0]), ValueError, r"sample must be in \[0, 65536\), got -7 at row 1"),
    ("seed", None, TypeError, r"seed must be an integer, got None"),
    ("antithetic", "no", TypeError, r"antithetic must be a bool, got 'no'"),
    ("paired", 1, TypeError, r"paired must be a bool, got 1 \(int\)"),
    ("backend", "", ValueError, r"backend must be one of 'auto', 'cpp', .*'reference', got ''"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "message"), INVALID)
def test_invalid_arguments(name: str, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"denoising_error: {message}"):
        ops.denoising_error(**{**valid(), name: value})
