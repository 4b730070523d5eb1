"""The extension's own `group_norm_silu`: equal bits everywhere, nothing written beyond, and argument checks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from guda_fast import _C
from native_calls import group_norm_silu_arguments, instruction_set

SETS = _C.instruction_sets()


def run(x: torch.Tensor, groups: int, **change: Any) -> torch.Tensor:
    """The result in memory that was nan before, inside a frame that must stay nan."""
    rows, positions, channels = x.shape
    frame = torch.full((rows + 2, positions + 2, channels + 2), torch.nan, dtype=x.dtype)
    out = frame[1:-1, 1:-1, 1:-1]
    _C.group_norm_silu(**{**group_norm_silu_arguments(out, x, groups), **change})
    assert int(frame.isnan().sum()) == frame.numel() - x.numel()
    return out.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [1, 15, 16, 17, 255, 256, 257, 600])
@pytest.mark.parametrize("channels", [1, 4, 15, 16, 17, 48, 70])
def test_equal_bits_for_every_set_and_thread_count(positions: int, channels: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(positions)
    x = (torch.randn(3, positions, channels, generator=random) * 3 + 1).to(dtype)
    results = []
    for name, threads in itertools.product(SETS, (1, 2, 5)):
        with instruction_set(name):
            results.append(run(x, 1, threads=threads))
            results.append(torch.cat([run(x[row : row + 1], 1, threads=threads) for row in range(3)]))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("name", SETS)
def test_rounding_to_bfloat16_is_pytorchs(name: str) -> None:
    """With one group of two opposite values the norm passes its shift through but for a factor of 0."""
    random = torch.Generator().manual_seed(0)
    shift = torch.cat([torch.randn(1000, generator=random), torch.tensor([1.00390625, 1.01171875, -1.00390625, 3e38])])
    ties = (shift.bfloat16().float().view(torch.int32) + 0x8000).view(torch.float32)
    for values in (shift, ties):
        x = torch.zeros(1, 2, len(values), dtype=torch.bfloat16)
        with instruction_set(name):
            out = run(x, 1, shift=values.data_ptr(), shift_stride=0, silu=False)
        assert torch.equal(out[0, 0], values.bfloat16())


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000])
@pytest.mark.parametrize("vector", ["weight", "bias", "addend", "scale", "shift"])
def test_a_nan_of_any_payload_stays_one_in_bfloat16(name: str, bits: int, vector: str) -> None:
    """Rounding adds to the bits of a float32: those of a nan must not become a number's."""
    values = torch.ones(1, 20)
    values.view(torch.int32)[0, 7] = bits
    x = torch.randn(1, 5, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    stride = {} if vector in ("weight", "bias") else {f"{vector}_stride": 20}
    out = torch.zeros_like(x)
    with instruction_set(name):
        _C.group_norm_silu(**{**group_norm_silu_arguments(out, x, 20), vector: values.data_ptr(), **stride})
    assert out[..., 7].isnan().all()
    assert int(out.isnan().sum()) == 5


REFUSALS = [
    ({"dtype": "float16"}, ValueError, "dtype must be one of 'float32', 'bfloat16', got 'float16'"),
    ({"rows": -1}, ValueError, "rows must be at least 0, got -1"),
    ({"positions": -1}, ValueError, "positions must be at least 0, got -1"),
    ({"channels": -4}, ValueError, "channels must be at least 0, got -4"),
    ({"rows": 2**40, "positions": 2**40}, ValueError, r"x must have at most 2\*\*40 elements"),
    ({"positions": 2**62, "channels": 4}, ValueError, r"x must have at most 2\*\*40 elements"),
    ({"channels": 2**42}, ValueError, r"x must have at most 2\*\*40 elements"),
    ({"rows": 2**63}, TypeError, "incompatible function arguments"),
    ({"dtype": ""}, ValueError, "dtype must be one of 'float32', 'bfloat16', got ''"),
    ({"dtype": 0}, TypeError, "incompatible function arguments"),
    ({"groups": -2}, ValueError, "groups must divide 4 channels, got -2"),
    ({"groups": 8}, ValueError, "groups must divide 4 channels, got 8"),
    ({"out": -1}, TypeError, "incompatible function arguments"),
    ({"out": 1, "dtype": "bfloat16"}, ValueError, "out must be aligned to 2 bytes"),
    ({"x": 1, "dtype": "bfloat16"}, ValueError, "x must be aligned to 2 bytes"),
    ({"threads": -1}, ValueError, "threads must be at least 1, got -1"),
    ({"eps": float("-inf")}, ValueError, "eps must be at least 0, got -inf"),
    ({"groups": 0}, ValueError, "groups must divide 4 channels, got 0"),
    ({"groups": 3}, ValueError, "groups must divide 4 channels, got 3"),
    ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1"),
    ({"eps": float("nan")}, ValueError, "eps must be at least 0, got nan"),
    ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
    ({"out": 0}, ValueError, "out must not be a null pointer"),
    ({"x": 0}, ValueError, "x must not be a null pointer"),
    ({"out_strides": (12, 3)}, ValueError, "out_strides must not let elements overlap"),
    ({"out_strides": (11, 4)}, ValueError, "out_strides must not let elements overlap"),
    ({"out_strides": (2**62, 2**62)}, ValueError, r"out_strides must reach at most 2\*\*59 elements"),
    ({"x_strides": (2**60, 4)}, ValueError, r"x_strides must reach at most 2\*\*59 elements"),
    ({"x_strides": (12, -(2**63))}, ValueError, r"x_strides must reach at most 2\*\*59 elements"),
    *(
        ({name: 8, f"{name}_stride": 2**60}, ValueError, rf"{name}_stride must reach at most 2\*\*59 elements")
        for name in ("addend", "scale", "shift")
    ),
    ({"out_strides": (12, 4, 1)}, TypeError, "incompatible function arguments"),
    *(({name: 2}, ValueError, f"{name} must be aligned to 4 bytes") for name in ("out", "x", "weight", "bias")),
    *(({name: 2}, ValueError, f"{name} must be aligned to 4 bytes") for name in ("addend", "scale", "shift")),
    ({"model_index": 4}, ValueError, "model_index must be aligned to 8 bytes"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, out = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    prefix = "" if error is TypeError else "group_norm_silu: "
    with pytest.raises(error, match=prefix + message):
        _C.group_norm_silu(**{**group_norm_silu_arguments(out, x, 2), **change})
    assert (out == 0).all()


@pytest.mark.parametrize("size", ["rows", "positions", "channels"])
def test_what_is_empty_reads_and_writes_nothing(size: str) -> None:
    x = torch.zeros(2, 3, 4)
    _C.group_norm_silu(**{**group_norm_silu_arguments(x, x, 2), size: 0, "out": 0, "x": 0})
    assert (x == 0).all()


@pytest.mark.parametrize("bad", [-1, 2, 2**40])
def test_rows_of_an_unknown_model_are_named(bad: int) -> None:
    x, index, weight = torch.zeros(2, 3, 4), torch.tensor([1, bad]), torch.zeros(2, 4)
    arguments = group_norm_silu_arguments(torch.zeros_like(x), x, 2)
    arguments |= {"model_index": index.data_ptr(), "weight": weight.data_ptr()}
    with pytest.raises(IndexError, match=f"model_index must be between 0 and 1, got {bad} in row 1"):
        _C.group_norm_silu(**arguments)
