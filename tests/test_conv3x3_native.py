"""The extension's own `conv3x3`: its error in every set, nothing written beyond, threads, and argument checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conv3x3_cases import assert_within_twice_eager, make
from guda_fast import _C
from native_calls import conv3x3_arguments, instruction_set

SETS = _C.instruction_sets()


def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, **change: Any) -> Tensor:
    """The result in memory that was nan before, inside a frame that must stay nan."""
    rows, _, height, width = x.shape
    frame = torch.full((rows + 2, height + 2, width + 2, len(weight) + 2), torch.nan)
    out = frame[1:-1, 1:-1, 1:-1, 1:-1].permute(0, 3, 1, 2)
    _C.conv3x3(**{**conv3x3_arguments(out, x, weight, bias), **change})
    assert int(frame.isnan().sum()) == frame.numel() - out.numel()
    return out.clone()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("channels", [(16, 32), (32, 32), (48, 64), (128, 96)])
def test_error_in_every_set(name: str, channels: tuple[int, int]) -> None:
    with instruction_set(name):
        for rows, height, width in ((1, 1, 1), (1, 2, 3), (3, 5, 4), (2, 16, 16), (5, 9, 7)):
            assert_within_twice_eager(*make(rows, *channels, height, width), run=run)


@pytest.mark.parametrize("name", SETS)
def test_whole_numbers_are_exact(name: str) -> None:
    """So is every product and sum on the way: a wrong coefficient would show."""
    random = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (2, 16, 6, 7), generator=random).float().contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-8, 9, (32, 16, 3, 3), generator=random).float()
    weight = weight.contiguous(memory_format=torch.channels_last)
    with instruction_set(name):
        assert torch.equal(run(x, weight), torch.nn.functional.conv2d(x.double(), weight.double(), padding=1).float())


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("shape", [(1, 16, 32, 3, 3), (7, 32, 64, 16, 12), (300, 16, 32, 2, 2)])
def test_threads_change_no_bit(name: str, shape: tuple[int, ...]) -> None:
    inputs = make(*shape)
    with instruction_set(name):
        expected = run(*inputs)
        assert all(torch.equal(run(*inputs, threads=threads), expected) for threads in (2, 3, 64))


def test_reads_activations_by_their_strides() -> None:
    x, weight, bias = make(3, 32, 32, 6, 5)
    apart = torch.full((3, 8, 6, 40), torch.nan)[:, 1:-1, :-1, 3:35].permute(0, 3, 1, 2).copy_(x)
    assert torch.equal(run(apart, weight, bias), run(x, weight, bias))


REFUSALS = [
    ({"rows": -1}, ValueError, "rows must be at least 0, got -1"),
    ({"height": -1}, ValueError, "height must be at least 0, got -1"),
    ({"width": -1}, ValueError, "width must be at least 0, got -1"),
    ({"inputs": 17}, ValueError, "inputs must be a multiple of 16, got 17"),
    ({"inputs": -16}, ValueError, "inputs must be a multiple of 16, got -16"),
    ({"outputs": 48}, ValueError, "outputs must be a multiple of 32, got 48"),
    ({"outputs": -32}, ValueError, "outputs must be a multiple of 32, got -32"),
    ({"rows": 2**40, "height": 2**40}, ValueError, r"x and out must have at most 2\*\*40 elements"),
    ({"inputs": 2**36, "rows": 1, "height": 1, "width": 1}, ValueError, r"weight must have at most 2\*\*40 elements"),
    ({"rows": 2**63}, TypeError, "incompatible function arguments"),
    ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
    *(({name: 0}, ValueError, f"{name} must not be a null pointer") for name in ("out", "x", "weight")),
    *(({name: 2}, ValueError, f"{name} must be aligned to 4 bytes") for name in ("out", "x", "weight", "bias")),
    ({"out": -1}, TypeError, "incompatible function arguments"),
    *(
        ({f"{name}_strides": strides}, ValueError, rf"{name}_strides must reach at most 2\*\*59 elements")
        for name in ("out", "x")
        for strides in ((2**60, 96, 32), (384, 2**62, 32), (384, 96, -(2**63)))
    ),
    ({"x_strides": (24, 4)}, TypeError, "incompatible function arguments"),
    *(
        ({"out_strides": strides}, ValueError, "out_strides must not let elements overlap")
        for strides in ((384, 96, 31), (384, 95, 32), (383, 96, 32), (0, 96, 32), (-384, 96, 32))
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, out = torch.zeros(2, 4, 3, 16).permute(0, 3, 1, 2), torch.zeros(2, 4, 3, 32).permute(0, 3, 1, 2)
    weight, bias = torch.ones(32, 16, 3, 3).contiguous(memory_format=torch.channels_last), torch.ones(32)
    prefix = "" if error is TypeError else "conv3x3: "
    with pytest.raises(error, match=prefix + message):
        _C.conv3x3(**{**conv3x3_arguments(out, x, weight, bias), **change})
    assert (out == 0).all()


@pytest.mark.parametrize("size", ["rows", "height", "width", "outputs"])
def test_what_is_empty_reads_and_writes_nothing(size: str) -> None:
    x, weight, bias = make(2, 32, 32, 3, 3)
    _C.conv3x3(**{**conv3x3_arguments(x, x, weight, bias), size: 0, "out": 0, "x": 0, "weight": 0, "bias": 0})


def test_no_inputs_leave_the_bias() -> None:
    bias = torch.arange(32.0)
    out = run(torch.empty(2, 0, 3, 3), torch.empty(32, 0, 3, 3), bias)
    assert torch.equal(out, bias[:, None, None].expand(2, 32, 3, 3))
