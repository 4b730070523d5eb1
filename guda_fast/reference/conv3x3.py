"""Definition of the op `conv3x3`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """3x3 convolution that keeps height and width; arguments as in `guda_fast.ops.conv3x3`, not checked here.

    out[b, o, i, j] = bias[o] + sum over c, u, v of weight[o, c, u, v] x[b, c, i + u - 1, j + v - 1]

    dtype: of the computation; float32 by default, float64 for float64 x and for the exact value

    Returns a new tensor [(B, O, H, W) in channels-last where x is, x's dtype, or `dtype` where given].
    """
    rows, _, height, width = x.shape
    shape = (rows, weight.shape[0], height, width)
    out = torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=layout_of(x))
    dtype = dtype or (torch.float64 if x.dtype == torch.float64 else torch.float32)
    padded, weight = F.pad(x.to(dtype), (1, 1, 1, 1)), weight.to(dtype)
    total = torch.zeros(shape, dtype=dtype, device=x.device)
    for u in range(3):
        for v in range(3):
            total += torch.einsum("oc,bchw->bohw", weight[:, :, u, v], padded[:, :, u : u + height, v : v + width])
    return out.copy_(total if bias is None else total + bias.to(dtype)[:, None, None])


def layout_of(x: Tensor) -> torch.memory_format:
    """The memory format of the result."""
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
