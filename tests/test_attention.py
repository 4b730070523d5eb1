"""`attention` on every backend: against its float64 definition and eager, layouts, invariances, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attention_cases import assert_within_twice_eager, in_token_order, make
from guda_fast import _backends, ops, reference
from guda_fast.errors import BackendUnavailableError
from guda_fast.ops.attention import MAX_DIM

# rows, heads, queries, keys, dim: one of each, tiles of 16 queries and blocks of 8 keys cut short, the fixed
# dimension 8 and others, cross-attention
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 1, 3),
    (1, 2, 16, 16, 8),
    (2, 2, 17, 9, 8),
    (1, 3, 33, 70, 16),
    (2, 1, 31, 77, 24),
    (1, 2, 15, 23, 32),
    (1, 1, 300, 301, 8),
]
WIDE = [(1, 2, 20, 77, 40), (2, 1, 40, 33, 64), (1, 1, 24, 65, 161), (1, 1, 64, 64, 256)]
DTYPES = [torch.float32, torch.bfloat16]


def by_hand(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The definition once more, in Python numbers and one query at a time."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for row, head, query in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).view(-1, 3).tolist():
        one = q[row, head, query].tolist()
        scores = [scale * math.fsum(a * b for a, b in zip(one, key, strict=True)) for key in k[row, head].tolist()]
        powers = [math.exp(score - max(scores)) for score in scores]
        for d, values in enumerate(v[row, head].T.tolist()):
            weighted = math.fsum(p * value for p, value in zip(powers, values, strict=True))
            out[row, head, query, d] = weighted / math.fsum(powers)
    return out


@pytest.mark.parametrize("shape", SHAPES[:-1])
@pytest.mark.parametrize("scale", [None, 0.0, 0.3])
def test_the_float64_reference_is_the_definition(shape: tuple[int, ...], scale: float | None) -> None:
    q, k, v = make(*shape)
    exact = reference.attention(q, k, v, scale=scale, dtype=torch.float64)
    torch.testing.assert_close(exact, by_hand(q, k, v, shape[4] ** -0.5 if scale is None else scale))
    assert exact.dtype == torch.float64


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_error_is_at_most_twice_eagers(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if backend == "cpp" and dtype == torch.float16:
        pytest.skip("cpp refuses float16, as test_what_cpp_refuses shows")
    assert_within_twice_eager(*make(*shape, dtype))
    assert_within_twice_eager(*make(*shape, dtype, size=4.0), scale=0.7)


@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_with_wide_heads(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if backend == "cpp" and _backends.native_detail() == "baseline":
        pytest.skip("test_attention_native has the baseline's, which is not quicker than PyTorch there")
    assert_within_twice_eager(*make(*shape, dtype))


def test_error_with_the_most_keys(backend: str) -> None:
    assert_within_twice_eager(*make(1, 1, 40, 4096, 8))
    assert_within_twice_eager(*make(1, 1, 40, 4096, 32, size=3.0))


@pytest.mark.parametrize("size", [30.0, 1e3, 1e15])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(backend: str, size: float, dtype: torch.dtype) -> None:
    """Scores up to 1e16, and a maximum that keys raise late and often: every later key has greater ones."""
    q, k, v = make(1, 2, 18, 45, 8, dtype, size=size)
    assert_within_twice_eager(q, k, v)
    rising = (k.abs() * torch.linspace(0.01, 1, 45).view(-1, 1)).to(dtype)
    for sign in (1, -1):
        assert_within_twice_eager(q.abs() * sign, rising, v)
    assert ops.attention(q, k, v).isfinite().all()


def test_scores_far_apart_give_one_key(backend: str) -> None:
    """Also where the first keys are so far below that their powers are no normal numbers, or 0."""
    for distance in (90.0, 126.0, 150.0, 1e30):
        k = torch.full((1, 1, 20, 8), -distance)
        k[0, 0, 13] = 0.0
        q, v = torch.ones(1, 1, 17, 8), torch.arange(160.0).view(1, 1, 20, 8)
        assert torch.equal(ops.attention(q, k, v, scale=1.0), v[:, :, 13:14].expand(1, 1, 17, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_where_eager_has_it(backend: str, dtype: torch.dtype, bad: float) -> None:
    """In one query, key or value, early and late, the result is nan, infinite or finite where PyTorch's is."""
    for name, position in (("q", 2), ("q", 16), ("k", 0), ("k", 18), ("v", 3), ("v", 18)):
        inputs = dict(zip("qkv", make(2, 2, 18, 19, 8, dtype), strict=True))
        clean = ops.attention(**inputs)
        inputs[name][1, 0, position, 5] = bad
        result, eager = ops.attention(**inputs), reference.attention(**inputs)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(result), kind(eager))
        result[1, 0] = clean[1, 0]
        assert torch.equal(result, clean)


def test_scores_of_minus_infinity(backend: str) -> None:
    q, k, v = torch.ones(1, 1, 17, 8), torch.zeros(1, 1, 20, 8), torch.randn(1, 1, 20, 8)
    k[:, :, :11] = -torch.inf
    torch.testing.assert_close(ops.attention(q, k, v), v[:, :, 11:].mean(2, keepdim=True).expand_as(q))
    k[:] = -torch.inf
    assert ops.attention(q, k, v).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 24])
def test_rows_queries_and_threads_change_no_bit(backend: str, dtype: torch.dtype, dim: int) -> None:
    if backend == "reference":
        pytest.skip("PyTorch's own sums are not promised to")
    q, k, v = make(5, 3, 150, 77, dim, dtype)
    q[2, 1, 3] *= 50.0  # a neighbour whose maximum rises where others' do not
    expected = ops.attention(q, k, v)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(ops.attention(q, k, v), expected)
            for row in (slice(0, 1), slice(2, 5)):
                assert torch.equal(ops.attention(q[row], k[row], v[row]), expected[row])
            assert torch.equal(ops.attention(q[:1, :1], k[:1, :1], v[:1, :1]), expected[:1, :1])
            assert torch.equal(ops.attention(q[:, :, 3:20], k, v), expected[:, :, 3:20])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    # PyTorch's products take the layout as a reason to sum in another order.
    close = {"rtol": 0.0, "atol": 0.0} if backend == "cpp" else {"rtol": 1e-5, "atol": torch.finfo(dtype).eps}
    q, k, v = make(2, 3, 18, 11, 8, dtype)
    expected = ops.attention(q, k, v)
    assert in_token_order(expected)
    packed = torch.cat([tensor.transpose(1, 2).flatten(2)[:, :11] for tensor in (q, k, v)], 2)
    parts = [part.unflatten(2, (3, 8)).transpose(1, 2) for part in packed.chunk(3, dim=2)]
    far = torch.cat([torch.full_like(q, torch.nan), q, torch.full_like(q, torch.nan)], 1)[:, 3:6]
    views = {
        "contiguous": (q.contiguous(), k.contiguous(), v.contiguous()),
        "some heads": (far, k, v),
        "some rows": (torch.stack((q, q * torch.nan), 1).flatten(0, 1)[::2], k, v),
        "backwards rows and heads": (q.transpose(0, 1).contiguous().transpose(0, 1), k, v),
    }
    for name, inputs in views.items():
        result = ops.attention(*inputs)
        torch.testing.assert_close(result, expected, **close, msg=lambda text, name=name: f"{name}: {text}")
        assert in_token_order(result)
    torch.testing.assert_close(ops.attention(*parts), expected[:, :, :11], **close)
    same = (k[:1].expand(2, -1, -1, -1), v[:1, :, :1].expand(2, -1, 11, -1))
    copies = [tensor.contiguous() for tensor in same]
    torch.testing.assert_close(ops.attention(q, *same), ops.attention(q, *copies), **close)


def test_elements_that_do_not_lie_side_by_side() -> None:
    q, k, v = make(2, 3, 18, 11, 8)
    expected = ops.attention(q, k, v)
    strided = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in (q, k, v)]
    torch.testing.assert_close(ops.attention(*strided), expected)
    assert in_token_order(ops.attention(*strided))


@pytest.mark.parametrize("shape", [(0, 2, 9, 4, 8), (2, 0, 9, 4, 8), (2, 2, 0, 4, 8), (2, 2, 9, 4, 0)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    if backend == "cpp" and shape[2] == 0:
        pytest.skip("without queries nothing is quicker than nothing")
    q, k, v = make(*shape)
    assert ops.attention(q, k, v).shape == q.shape


def test_no_keys_give_zero() -> None:
    q, k, v = make(2, 2, 9, 0, 8)
    assert torch.equal(ops.attention(q, k, v), torch.zeros(2, 2, 9, 8))
    assert torch.equal(ops.attention(q, k, v, backend="reference"), torch.zeros(2, 2, 9, 8))


def test_offsets_beyond_32_bits(backend: str) -> None:
    q, k, v = make(2, 2, 9, 5, 8)
    expected = ops.attention(q, k, v)
    far = torch.empty(2**31 + 1024)  # eight GiB of addresses; only the pages that are touched take memory

    def apart(tensor: Tensor) -> Tensor:
        return far.as_strided(tensor.shape, (2**31, 8, 16, 1)).copy_(tensor)

    assert torch.equal(ops.attention(apart(q), k, v), expected)
    assert torch.equal(ops.attention(q, apart(k), v), expected)
    assert torch.equal(ops.attention(q, k, apart(v)), expected)


def test_results_carry_no_gradient(backend: str) -> None:
    q, k, v = make(1, 1, 9, 5, 8)
    assert not ops.attention(q.requires_grad_(), k, v).requires_grad


def test_float64_is_computed_in_float64() -> None:
    q, k, v = (tensor.double() + 1e-9 for tensor in make(1, 2, 9, 5, 8))
    exact = reference.attention(q, k, v)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(ops.attention(q, k, v), exact, rtol=1e-13, atol=1e-13)


def test_torch_is_pytorchs_own() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = make(2, 2, 9, 5, 8, dtype)
        result = ops.attention(q, k, v, backend="torch")
        assert torch.equal(result, F.scaled_dot_product_attention(q, k, v))
        assert in_token_order(result)


def test_what_cpp_refuses() -> None:
    pytest.importorskip("guda_fast._C")
    most = MAX_DIM[_backends.native_detail()]
    q, k, v = make(1, 1, 9, 5, 8)
    for inputs, reason in (
        ((q.double(), k.double(), v.double()), "q is float64, and cpp computes in float32"),
        ((q.half(), k.half(), v.half()), "q is float16, which cpp does not read"),
        ((q[..., ::2], k[..., :4], v[..., :4]), "the elements of a head do not lie next to each other in q"),
        ((q[..., :4], k[..., ::2], v[..., :4]), "the elements of a head do not lie next to each other in k"),
        ((q[..., :4], k[..., :4], v[..., ::2]), "the elements of a head do not lie next to each other in v"),
        ((q, torch._neg_view(k), v), "k is a lazily negated view"),
        (make(1, 1, 9, 0, 8), "there are no keys"),
        (make(1, 1, 9, 5, most + 1), f"heads have {most + 1} dimensions, and cpp with .* takes {most} at most"),
        (make(1, 1, 9, 4097, 8), "there are 4097 keys, and cpp takes 4096 at most"),
        (make(1, 1, 7, 8, 8), "7 queries are too few for what cpp does to 8 keys first"),
    ):
        with pytest.raises(BackendUnavailableError, match=f"cpp: {reason}"):
            ops.attention(*inputs, backend="cpp")
        # PyTorch takes over where nobody names cpp.
        assert ops.attention(*inputs).shape == inputs[0].shape


def test_order_of_backends() -> None:
    q, k, v = make(1, 1, 9, 5, 8)
    lines = _backends.explain("attention", q, k, v).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["cpp", "torch", "reference"]
    assert "chosen" in lines[2 if _backends.native() is None else 1]


INVALID = [
    ("q", None, TypeError, r"q must be a torch.Tensor, got None"),
    ("q", torch.zeros(2, 3, 4), ValueError, r"q must have shape \(\*, \*, \*, \*\)"),
    ("q", torch.zeros(2, 2, 3, 4).long(), TypeError, r"q must be float32 or .* got int64"),
    ("q", torch.zeros(2, 2, 3, 4).to_sparse(), TypeError, r"q must be a dense tensor"),
    ("k", torch.zeros(2, 2, 5, 3), ValueError, r"k must have shape \(2, 2, \*, 4\)"),
    ("k", torch.zeros(2, 1, 5, 4), ValueError, r"k must have shape \(2, 2, \*, 4\)"),
    ("k", torch.zeros(2, 2, 5, 4).half(), TypeError, r"k must be float32, got float16"),
    ("k", torch.zeros(2, 2, 5, 4, device="meta"), ValueError, r"k must be on cpu"),
    ("v", torch.zeros(2, 2, 6, 4), ValueError, r"v must have shape \(2, 2, 5, 4\)"),
    ("v", torch.zeros(2, 2, 5, 4).double(), TypeError, r"v must be float32, got float64"),
    ("v", torch.zeros(2, 2, 5, 4, device="meta"), ValueError, r"v must be on cpu"),
    ("v", 0.0, TypeError, r"v must be a torch.Tensor, got 0.0"),
    ("scale", -1.0, ValueError, r"scale must be finite and at least 0, got -1.0"),
    ("scale", math.nan, ValueError, r"scale must be finite and at least 0, got nan"),
    ("scale", math.inf, ValueError, r"scale must be finite and at least 0, got inf"),
    ("scale", True, TypeError, r"scale must be a real number, got True"),
    ("backend", "flash", ValueError, r"backend must be one of"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), INVALID)
def test_invalid_arguments(name: str, value: object, error: type[Exception], message: str) -> None:
    valid: dict[str, Any] = {"q": torch.zeros(2, 2, 3, 4), "k": torch.zeros(2, 2, 5, 4), "v": torch.zeros(2, 2, 5, 4)}
    with pytest.raises(error, match=f"attention: {message}"):
        ops.attention(**{**valid, name: value})
