"""Convolutions with the op `conv3x3` in them."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from guda_fast import ops
from guda_fast.forward._original import runs_original
from guda_fast.ops.conv3x3 import INPUT_STEP, OUTPUT_STEP


class FusedConv2d(nn.Conv2d):
    """A convolution that the op computes: PyTorch's in everything but the kernel of float32 on a CPU."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the original's name)
        if input.dtype != torch.float32 or input.device.type != "cpu" or input.dim() != 4 or runs_original(input):
            return super().forward(input)
        return ops.conv3x3(input, self.weight, self.bias)


CONVOLUTIONS = (nn.Conv2d, FusedConv2d)


def is_conv2d(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is PyTorch's convolution, fused or not, and no class made from it."""
    return type(module) in CONVOLUTIONS


def is_conv3x3(conv: nn.Conv2d) -> bool:
    """Whether the op computes a convolution, and does so in a way of its own."""
    window = (conv.kernel_size, conv.stride, conv.dilation, conv.groups, conv.padding_mode)
    whole = conv.in_channels % INPUT_STEP == 0 and conv.out_channels % OUTPUT_STEP == 0
    return window == ((3, 3), (1, 1), (1, 1), 1, "zeros") and conv.padding in ((1, 1), "same") and whole
