"""`group_norm_silu` on every backend: against its float64 definition and eager, layouts, invariances, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from group_norm_silu_cases import assert_within_twice_eager, channels_last, eager, make, make_vectors
from guda_fast import ops, reference, use_backend
from guda_fast.errors import BackendUnavailableError
from guda_fast.ops import _looks

# rows, channels, groups, positions: one channel, one position, odd groups, blocks of 16 positions and channels
# cut short, more than one chunk of positions
SHAPES = [
    (1, 1, 1, (1,)),
    (2, 6, 3, ()),
    (3, 5, 1, (7,)),
    (2, 12, 4, (3, 5)),
    (2, 32, 32, (4, 4)),
    (3, 96, 32, (5, 7)),
    (2, 17, 17, (33,)),
    (1, 70, 7, (2, 3, 5)),
    (2, 20, 2, (17, 31)),
    (1, 64, 32, (16, 16)),
]
DTYPES = [torch.float32, torch.bfloat16]


def by_hand(x: Tensor, groups: int, eps: float, silu: bool, **vectors: Any) -> Tensor:
    """The definition once more, in Python numbers and one group at a time."""
    out = torch.empty(x.shape, dtype=torch.float64)
    rows, channels = x.shape[:2]
    width = channels // groups
    index = vectors.get("model_index")
    for row in range(rows):
        parameters = {
            name: vectors[name] if index is None else vectors[name][index[row]] for name in ("weight", "bias")
        }
        for group in range(groups):
            own = range(group * width, (group + 1) * width)
            h = [[v + vectors["addend"][row, c].item() for v in x[row, c].double().flatten().tolist()] for c in own]
            count = sum(len(values) for values in h)
            mean = math.fsum(v for values in h for v in values) / count
            variance = math.fsum((v - mean) ** 2 for values in h for v in values) / count
            for c, values in zip(own, h, strict=True):
                n = torch.tensor([(v - mean) / math.sqrt(variance + eps) for v in values], dtype=torch.float64)
                y = n * parameters["weight"][c].double() + parameters["bias"][c].double()
                y = y * (1 + vectors["scale"][row, c].double()) + vectors["shift"][row, c].double()
                out[row, c] = (y / (1 + (-y).exp()) if silu else y).view(x.shape[2:])
    return out


@pytest.mark.parametrize(("rows", "channels", "groups", "positions"), SHAPES)
@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize("silu", [False, True])
def test_the_float64_reference_is_the_definition(
    rows: int, channels: int, groups: int, positions: tuple[int, ...], models: int | None, silu: bool
) -> None:
    x, vectors = make(rows, channels, positions), make_vectors(rows, channels, models)
    exact = reference.group_norm_silu(x, groups, **vectors, eps=1e-3, silu=silu, dtype=torch.float64)
    torch.testing.assert_close(exact, by_hand(x, groups, 1e-3, silu, **vectors), rtol=1e-11, atol=1e-11)
    assert exact.dtype == torch.float64


@pytest.mark.parametrize(("rows", "channels", "groups", "positions"), SHAPES)
@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_error_is_at_most_twice_eagers(
    backend: str, rows: int, channels: int, groups: int, positions: tuple[int, ...], models: int | None,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    if backend == "cpp" and dtype == torch.float16:
        pytest.skip("cpp refuses float16, as test_what_cpp_refuses shows")
    x, vectors = make(rows, channels, positions, dtype), make_vectors(rows, channels, models)
    assert_within_twice_eager(x, groups, **vectors)
    assert_within_twice_eager(x, groups, silu=False, **vectors)
    if models is None and positions:
        assert_within_twice_eager(x, groups)
        assert_within_twice_eager(x, groups, addend=vectors["addend"])
        assert_within_twice_eager(x, groups, weight=vectors["weight"], bias=vectors["bias"], eps=0.1)


@pytest.mark.parametrize("offset", [0.0, 30.0, -1e4, 1e6])
@pytest.mark.parametrize("positions", [(8, 8), (32, 33)])
def test_large_offsets(backend: str, offset: float, positions: tuple[int, ...]) -> None:
    x = make(2, 64, positions, offset=offset)
    assert_within_twice_eager(x, 8)
    assert_within_twice_eager(x, 8, **make_vectors(2, 64))


def test_an_outlier_first(backend: str) -> None:
    x = make(2, 32, (32, 32))
    x[:, :, 0, 0] = 1e4
    assert_within_twice_eager(x, 8)


def test_constant_groups(backend: str) -> None:
    x = channels_last(torch.full((2, 8, 5, 5), 3.0))
    # PyTorch rounds the mean over the deviation; cpp subtracts the mean first, which is exact here.
    bound = 0.0 if backend == "cpp" else 3 / math.sqrt(1e-5) * 2.0**-23
    assert (ops.group_norm_silu(x, 2).abs() <= bound).all()
    bias = torch.arange(8.0)
    off = ops.group_norm_silu(x, 2, None, bias, silu=False) - bias.view(8, 1, 1)
    assert (off.abs() <= 2 * bound).all()


def test_the_activation_over_the_whole_range(backend: str) -> None:
    """Through a norm that is the identity but for its rounding: y runs over all that a bias can give."""
    y = torch.cat([torch.linspace(-110, 110, 4001), torch.logspace(-38, 38, 999), -torch.logspace(-38, 38, 1000)])
    y = torch.cat([y, torch.tensor([0.0, -0.0, 88.72, -88.72, -87.33, -103.0, 3e38, -3e38])])
    zero = torch.zeros(1, len(y), 2)
    result = ops.group_norm_silu(channels_last(zero), 1, None, y)[0, :, 0]
    exact = y.double() / (1 + (-y.double()).exp())
    # exp is within three roundings, the sum, the quotient and y's own make it six. Below -87 (-88.7 in PyTorch)
    # the result is the smallest in size that float32 arithmetic gives, 87 e^-87.
    bound = 6 * 2.0**-24 * exact.abs() + 87 * math.exp(-87)
    assert ((result.double() - exact).abs() <= bound).all()


def test_what_is_not_a_number_stays_in_its_group(backend: str) -> None:
    x = make(2, 32, (5, 5))
    clean = ops.group_norm_silu(x, 4)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[1, 9, 2, 2] = bad
        result = ops.group_norm_silu(x, 4)
        assert result[1, 8:16].isnan().all()
        result[1, 8:16] = clean[1, 8:16]
        assert torch.equal(result, clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_threads_change_no_bit(backend: str, dtype: torch.dtype) -> None:
    if backend == "reference":
        pytest.skip("PyTorch's own sums are not promised to")
    x, vectors = make(7, 48, (17, 31), dtype), make_vectors(7, 48, models=3)
    expected = ops.group_norm_silu(x, 8, **vectors)
    before = torch.get_num_threads()
    per_row = ("addend", "scale", "shift", "model_index")
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(ops.group_norm_silu(x, 8, **vectors), expected)
            for part in (slice(0, 1), slice(3, 5), slice(6, 7)):
                some = {name: v[part] if name in per_row else v for name, v in vectors.items()}
                assert torch.equal(ops.group_norm_silu(x[part], 8, **some), expected[part])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    x, vectors = make(3, 24, (6, 5), dtype), make_vectors(3, 24)
    expected = ops.group_norm_silu(x, 4, **vectors)
    assert expected.stride() == x.stride()
    wide = channels_last(torch.cat((x * torch.nan, x, x * torch.nan), dim=1))
    views = {
        "some channels": wide[:, 24:48],
        "some rows": channels_last(torch.stack((x, x * torch.nan), 1).flatten(0, 1))[::2],
        "one row many times": x[:1].expand(3, -1, -1, -1),
    }
    assert torch.equal(ops.group_norm_silu(views["some channels"], 4, **vectors), expected)
    assert torch.equal(ops.group_norm_silu(views["some rows"], 4, **vectors), expected)
    same = ops.group_norm_silu(views["one row many times"], 4)
    # For an expanded tensor PyTorch takes its contiguous path, which rounds in another order.
    bound = 0.0 if backend == "cpp" else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(same, ops.group_norm_silu(x[:1], 4).expand_as(x), rtol=bound, atol=bound)
    # The halves of one product, as a time embedding gives them, and other strided vectors.
    pair = torch.cat((vectors["scale"], vectors["shift"]), 1)
    vectors["scale"], vectors["shift"] = pair.chunk(2, dim=1)
    vectors["addend"] = vectors["addend"].t().contiguous().t()
    vectors["weight"] = torch.stack((vectors["weight"], vectors["weight"]), 1)[:, 0]
    assert torch.equal(ops.group_norm_silu(x, 4, **vectors), expected)


def test_contiguous_stays_contiguous() -> None:
    x, vectors = make(3, 24, (6, 5)), make_vectors(3, 24)
    plain = ops.group_norm_silu(x.contiguous(), 4, **vectors)
    assert plain.is_contiguous()
    torch.testing.assert_close(plain, ops.group_norm_silu(x, 4, **vectors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0), (2, 4, 3, 0), (3, 0, 2), (0, 4)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    x = channels_last(torch.zeros(shape))
    assert ops.group_norm_silu(x, 2, **make_vectors(*shape[:2])).shape == shape


def test_one_pixel_and_vectors(backend: str) -> None:
    """Shapes whose strides say nothing about their layout."""
    for shape in ((3, 8), (3, 8, 1), (3, 8, 1, 1), (3, 1, 4, 4), (1, 8, 1, 1)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert_within_twice_eager(x, 1, **make_vectors(*shape[:2]))


def test_offsets_beyond_32_bits(backend: str) -> None:
    x = make(2, 8, (3, 3))
    expected = ops.group_norm_silu(x, 2)
    far = torch.empty(2**31 + 256)  # eight GiB of addresses; only the pages that are touched take memory
    view = far.as_strided((2, 8, 3, 3), (2**31, 1, 24, 8)).copy_(x)
    assert torch.equal(ops.group_norm_silu(view, 2), expected)


def test_results_carry_no_gradient(backend: str) -> None:
    assert not ops.group_norm_silu(make(1, 4, (3,)).requires_grad_(), 2).requires_grad


def test_float64_is_computed_in_float64_by_the_reference() -> None:
    x = make(2, 8, (3, 3)).double() + 1e-9
    torch.testing.assert_close(ops.group_norm_silu(x, 2), eager(x, 2), rtol=1e-13, atol=1e-13)


def test_what_cpp_refuses() -> None:
    pytest.importorskip("guda_fast._C")
    x = make(2, 8, (3, 3))
    for value, reason in (
        (x.double(), "x is float64, and cpp computes in float32"),
        (x.half(), "x is float16, which cpp does not read"),
        (x.contiguous(), "x is not in channels-last"),
        (x[..., :2], "x is not in channels-last"),  # positions that do not lie evenly
        (x[..., :1, :1].expand(2, 8, 3, 3), "x is not in channels-last"),
        (x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1), "x is not in channels-last"),  # rows inside
        (x.as_strided((2, 8, 3), (80, 1, 4)), "x is not in channels-last"),  # positions that overlap
        (torch._neg_view(x), "x is a lazily negated view"),
    ):
        with pytest.raises(BackendUnavailableError, match=f"cpp: {reason}"):
            ops.group_norm_silu(value, 2, backend="cpp")


def test_vectors_that_memory_holds_otherwise(backend: str) -> None:
    x, vectors = make(2, 8, (3, 3)), make_vectors(2, 8)
    expected = ops.group_norm_silu(x, 2, **vectors)
    negated = {name: torch._neg_view(-vector) for name, vector in vectors.items()}
    assert all(vector.is_neg() for vector in negated.values())
    assert torch.equal(ops.group_norm_silu(x, 2, **negated), expected)


def valid() -> dict[str, Any]:
    vectors = {name: torch.zeros(2, 4) for name in ("weight", "bias", "addend", "scale", "shift")}
    return {"x": torch.zeros(2, 4, 3, 3), "groups": 2, **vectors, "model_index": torch.tensor([0, 1])}


INVALID = [
    ("x", None, TypeError, r"x must be a torch.Tensor, got None"),
    ("x", torch.zeros(4), ValueError, r"x must have at least 2 dimensions"),
    ("x", torch.zeros(2, 4, 3, 3).long(), TypeError, r"x must be float32 or .* got int64"),
    ("groups", 0, ValueError, r"groups must be at least 1, got 0"),
    ("groups", 3, ValueError, r"groups must divide the 4 channels of x, got 3"),
    ("x", torch.zeros(2, 4, 3, 3).to_sparse(), TypeError, r"x must be a dense tensor, got"),
    ("x", torch.zeros(2, 4, 1, 1, 1, 1), ValueError, r"x must have at most 5 dimensions"),
    ("groups", True, TypeError, r"groups must be an integer, got True"),
    ("groups", 2.0, TypeError, r"groups must be an integer, got 2.0"),
    ("weight", torch.zeros(4), ValueError, r"weight must have shape \(\*, 4\)"),
    ("bias", torch.zeros(2, 5), ValueError, r"bias must have shape \(\*, 4\)"),
    ("bias", torch.zeros(2, 4).double(), TypeError, r"bias must be float32, got float64"),
    ("addend", torch.zeros(2, 4, 1, 1), ValueError, r"addend must have shape \(2, 4\)"),
    ("addend", torch.zeros(2, 4, device="meta"), ValueError, r"addend must be on cpu"),
    ("scale", torch.zeros(1, 4), ValueError, r"scale must have shape \(2, 4\)"),
    ("shift", 1.0, TypeError, r"shift must be a torch.Tensor, got 1.0"),
    ("model_index", torch.tensor([0, 2]), ValueError, r"model_index must be in \[0, 2\), got 2 at row 1"),
    ("model_index", torch.tensor([0, 1, 1]), ValueError, r"model_index must have shape \(2,\)"),
    ("model_index", torch.zeros(2), TypeError, r"model_index must be int64, got float32"),
    ("model_index", None, ValueError, r"weight must have shape \(4,\)"),
    ("weight", torch.zeros(2, 4).half(), TypeError, r"weight must be float32, got float16"),
    ("model_index", torch.tensor([0, 1], device="meta"), ValueError, r"model_index must be on cpu"),
    ("model_index", torch.tensor([-1, 1]), ValueError, r"model_index must be in \[0, 2\), got -1 at row 0"),
    ("eps", math.nan, ValueError, r"eps must be finite and at least 0"),
    ("eps", "0", TypeError, r"eps must be a real number, got '0'"),
    ("eps", -1.0, ValueError, r"eps must be finite and at least 0"),
    ("silu", 1, TypeError, r"silu must be a bool, got 1"),
    ("backend", "", ValueError, r"backend must be one of"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "message"), INVALID)
def test_invalid_arguments(name: str, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"group_norm_silu: {message}"):
        ops.group_norm_silu(**{**valid(), name: value})


def test_a_call_that_looks_like_one_before_reads_its_own_memory() -> None:
    x, other = (channels_last(torch.randn(2, 8, 3, 3)) for _ in range(2))
    weight, bias = torch.randn(2, 8)
    for _ in range(2):
        expected = ops.group_norm_silu(x, 4, weight, bias, backend="reference")
        torch.testing.assert_close(ops.group_norm_silu(x, 4, weight, bias), expected, rtol=1e-5, atol=1e-6)
        x, weight = other, weight + 1


def test_a_call_is_validated_whatever_went_well_before() -> None:
    x, weight = channels_last(torch.randn(2, 8, 3, 3)), torch.ones(8)
    for _ in range(2):
        ops.group_norm_silu(x, 4, weight)
        with pytest.raises(TypeError, match="silu must be a bool, got 1"):
            ops.group_norm_silu(x, 4, weight, silu=1)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="weight must be float32, got float64"):
            ops.group_norm_silu(x, 4, weight.double())
        with pytest.raises(BackendUnavailableError, match="cuda"):
            ops.group_norm_silu(x, 4, weight, backend="cuda")
        with use_backend("reference"):
            assert torch.equal(
                ops.group_norm_silu(x, 4, weight), ops.group_norm_silu(x, 4, weight, backend="reference")
            )
        negated = torch._neg_view(x)
        expected = ops.group_norm_silu(-x, 4, weight, backend="reference")
        torch.testing.assert_close(ops.group_norm_silu(negated, 4, weight), expected, rtol=1e-5, atol=1e-6)


def test_what_is_no_plain_tensor_is_looked_at_in_every_call() -> None:
    class Own(Tensor):
        pass

    x = channels_last(torch.randn(2, 8, 4, 4))
    for weight in (torch.ones(8), torch.randn(16)[::2]):
        found = ops.group_norm_silu(x, 4, weight.as_subclass(Own))
        expected = ops.group_norm_silu(x, 4, weight, backend="reference")
        torch.testing.assert_close(found.as_subclass(Tensor), expected, rtol=1e-5, atol=1e-6)
    for weight in (torch.ones(3), torch.ones(8, dtype=torch.float64)):
        with pytest.raises((TypeError, ValueError), match="weight must"):
            ops.group_norm_silu(x, 4, weight.as_subclass(Own))


def test_too_many_looks_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_looks, "_MOST", 2)
    remembered = _looks.Remembered[int]()
    for number in range(3):
        remembered.keep(number, number)
    assert [remembered.get(number) for number in range(3)] == [None, None, 2]
