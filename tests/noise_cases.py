"""Shapes and memory layouts that the tests of CUDA kernels run, on the host and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

# Within one block of four, one chunk of 4,096, and past it; with and without rows of a multiple of 16 bytes.
SHAPES = [(1,), (3,), (17,), (64,), (4095,), (4096,), (4097,), (3, 7, 5), (2, 3, 33, 31), (4, 48, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layouts(tensor: Tensor, leading: int) -> dict[str, Tensor]:
    """The same values in other memory layouts; the first `leading` dimensions are outside a sample."""
    dim = tensor.dim()
    last = tensor.movedim(leading, -1).contiguous().movedim(-1, leading)
    back = tensor.permute(*reversed(range(dim))).contiguous().permute(*reversed(range(dim)))
    # NaN lies between the elements, and shows wherever it is read.
    wide = torch.cat((tensor, tensor * torch.nan), dim=leading).narrow(leading, 0, tensor.shape[leading])
    stepped = torch.stack((tensor, tensor * torch.nan), dim=-1).flatten(-2)[..., ::2]
    # Contiguous from the second element of its memory on: nothing is aligned to more than an element.
    shifted = torch.cat((tensor.flatten()[:1] * torch.nan, tensor.flatten()))[1:].view(tensor.shape)
    return {
        "contiguous": tensor.contiguous(),
        "channels last": last,
        "reversed": back,
        "wide": wide,
        "stepped": stepped,
        "shifted": shifted,
        "outer swapped": tensor.transpose(0, leading - 1).contiguous().transpose(0, leading - 1),
    }
