"""The extension's own `attention`: its error in every set, nothing written beyond, threads, and argument checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_cases import assert_within_twice_eager, make
from guda_fast import _C
from native_calls import attention_arguments, instruction_set

SETS = _C.instruction_sets()


def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, **change: Any) -> Tensor:
    """The result in memory that was nan before, inside a frame that must stay nan."""
    rows, heads, queries, dim = q.shape
    frame = torch.full((rows + 2, queries + 2, heads + 2, dim + 2), torch.nan, dtype=q.dtype)
    out = frame[1:-1, 1:-1, 1:-1, 1:-1].transpose(1, 2)
    if scale is not None:
        change["scale"] = scale
    _C.attention(**{**attention_arguments(out, q, k, v), **change})
    assert int(frame.isnan().sum()) == frame.numel() - q.numel()
    return out.clone()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 2, 3, 7, 8, 9, 16, 24, 32, 40, 64, 100])
def test_error_in_every_set(name: str, dim: int, dtype: torch.dtype) -> None:
    with instruction_set(name):
        for queries, keys in ((1, 1), (3, 77), (16, 16), (17, 15), (40, 9)):
            assert_within_twice_eager(*make(2, 2, queries, keys, dim, dtype), run=run)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1000, 33, 8), (2, 3, 100, 33, 8), (7, 5, 17, 33, 12)])
def test_threads_change_no_bit(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """One pair for all threads, some for each, and threads that take part of a pair."""
    q, k, v = make(*shape, dtype)
    with instruction_set(name):
        expected = run(q, k, v)
        assert all(torch.equal(run(q, k, v, threads=threads), expected) for threads in (2, 3, 5, 64))


@pytest.mark.parametrize("name", SETS)
def test_rounding_to_bfloat16_is_pytorchs(name: str) -> None:
    """With one key the result is its value, times the reciprocal of 1."""
    random = torch.Generator().manual_seed(0)
    v = torch.randn(1, 1, 1, 1000, generator=random).bfloat16()
    q = torch.zeros(1, 1, 5, 1000, dtype=torch.bfloat16)
    with instruction_set(name):
        assert torch.equal(run(q, v, v), v.expand(1, 1, 5, 1000))
        halves = torch.cat([v, -torch.roll(v, 1, 3)], 2)
        expected = halves.float().mean(2, keepdim=True).bfloat16().expand(1, 1, 5, 1000)
        assert torch.equal(run(q, halves, halves), expected)


REFUSALS = [
    ({"dtype": "float16"}, ValueError, "dtype must be one of 'float32', 'bfloat16', got 'float16'"),
    ({"dtype": 0}, TypeError, "incompatible function arguments"),
    ({"rows": -1}, ValueError, "rows must be at least 0, got -1"),
    ({"heads": -1}, ValueError, "heads must be at least 0, got -1"),
    ({"queries": -1}, ValueError, "queries must be at least 0, got -1"),
    ({"keys": -1}, ValueError, "keys must be at least 1, got -1"),
    ({"keys": 0}, ValueError, "keys must be at least 1, got 0"),
    ({"dim": -4}, ValueError, "dim must be at least 0, got -4"),
    ({"rows": 2**40, "heads": 2**40}, ValueError, r"q must have at most 2\*\*40 elements"),
    ({"queries": 2**62}, ValueError, r"q must have at most 2\*\*40 elements"),
    ({"keys": 2**62}, ValueError, r"k must have at most 2\*\*40 elements"),
    ({"dim": 2**42}, ValueError, r"q must have at most 2\*\*40 elements"),
    ({"rows": 2**63}, TypeError, "incompatible function arguments"),
    ({"scale": -1.0}, ValueError, "scale must be finite and at least 0, got -1"),
    ({"scale": float("nan")}, ValueError, "scale must be finite and at least 0, got nan"),
    ({"scale": float("inf")}, ValueError, "scale must be finite and at least 0, got inf"),
    ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
    ({"threads": -1}, ValueError, "threads must be at least 1, got -1"),
    *(({name: 0}, ValueError, f"{name} must not be a null pointer") for name in ("out", "q", "k", "v")),
    *(({name: 2}, ValueError, f"{name} must be aligned to 4 bytes") for name in ("out", "q", "k", "v")),
    ({"v": 1, "dtype": "bfloat16"}, ValueError, "v must be aligned to 2 bytes"),
    ({"out": -1}, TypeError, "incompatible function arguments"),
    *(
        ({f"{name}_strides": strides}, ValueError, rf"{name}_strides must reach at most 2\*\*59 elements")
        for name in ("out", "q", "k", "v")
        for strides in ((2**60, 4, 8), (24, 2**62, 8), (24, 4, -(2**63)), (2**59, 2**58, 8))
    ),
    ({"q_strides": (24, 4)}, TypeError, "incompatible function arguments"),
    *(
        ({"out_strides": strides}, ValueError, "out_strides must not let elements overlap")
        for strides in ((24, 3, 8), (24, 4, 7), (23, 4, 8), (0, 4, 8), (24, 4, 0), (24, 0, 4), (-24, 4, 8))
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, out = torch.zeros(2, 3, 2, 4).transpose(1, 2), torch.zeros(2, 3, 2, 4).transpose(1, 2)
    prefix = "" if error is TypeError else "attention: "
    with pytest.raises(error, match=prefix + message):
        _C.attention(**{**attention_arguments(out, q, q, q), **change})
    assert (out == 0).all()


@pytest.mark.parametrize("size", ["rows", "heads", "queries", "dim"])
def test_what_is_empty_reads_and_writes_nothing(size: str) -> None:
    q = torch.zeros(2, 2, 3, 4)
    _C.attention(**{**attention_arguments(q, q, q, q), size: 0, "out": 0, "q": 0, "k": 0, "v": 0})
    assert (q == 0).all()
