"""Inputs of `conv3x3`, and the bound on its error: twice that of PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from guda_fast import _backends, ops, reference


def make(
    rows: int, inputs: int, outputs: int, height: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x and weight in channels-last, as in the engine's resident model, and a bias."""
    random = torch.Generator().manual_seed(rows + 3 * inputs + 5 * outputs + 7 * height + 11 * width)

    def normal(*shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=random).to(dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor

    return normal(rows, inputs, height, width), normal(outputs, inputs, 3, 3) / (3 * inputs**0.5), normal(outputs)


def assert_within_twice_eager(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, run: Callable[..., Tensor] = ops.conv3x3
) -> None:
    """The largest and the root mean square error; one rounding of the result is granted where eager is exact.

    Eager's is taken from maps of 8x8 and more, which repeat small ones: at their edges it sums fewer terms, where
    ours has as many as everywhere. The baseline has no fused multiply-add, which eager has: as many roundings
    again, so twice the largest error, and the root of two in the mean of squares.
    """
    exact = reference.conv3x3(x, weight, bias, dtype=torch.float64)
    ours = run(x, weight, bias)
    assert ours.dtype == x.dtype
    error = (ours.double() - exact).abs()
    large = x.repeat(1, 1, -(-8 // x.shape[2]), -(-8 // x.shape[3])).contiguous(memory_format=torch.channels_last)
    eager = F.conv2d(large, weight, bias, padding=1).double()
    rival = (eager - reference.conv3x3(large, weight, bias, dtype=torch.float64)).abs()
    rounding = torch.finfo(x.dtype).eps / 2
    roundings = 2 if _backends.native_detail() == "baseline" else 1
    largest = 2 * roundings * rival.max() + rounding * exact.abs().max()
    mean = 2 * roundings**0.5 * rival.square().mean().sqrt() + rounding * exact.square().mean().sqrt()
    assert float(error.max()) <= float(largest)
    assert float(error.square().mean().sqrt()) <= float(mean)
