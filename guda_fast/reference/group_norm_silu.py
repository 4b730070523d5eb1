"""Definition of the op `group_norm_silu`."""

from __future__ import annotations

import torch
from torch import Tensor


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    addend: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    model_index: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Group norm and what surrounds it; arguments as in `guda_fast.ops.group_norm_silu`, not checked here.

    h = x + addend; n = (h - mean) / sqrt(variance + eps) over each row's group of channels and all positions
    y = (n weight + bias) (1 + scale) + shift; the result is y sigmoid(y), or y

    dtype: of the computation; float32 by default, float64 for float64 x and for the exact value

    Returns a new tensor [shape and memory layout of x, x's dtype, or `dtype` where given].
    """
    result_dtype = dtype or x.dtype
    dtype = dtype or (torch.float64 if x.dtype == torch.float64 else torch.float32)
    column = (*x.shape[:2], *([1] * (x.dim() - 2)))

    def broadcast(vector: Tensor) -> Tensor:
        return vector.to(dtype).view(column)

    out = torch.empty_like(x, dtype=result_dtype)
    if x.numel() == 0:
        return out
    h = x.to(dtype)
    if addend is not None:
        h = h + broadcast(addend)
    if model_index is None:
        own_weight, own_bias = (None if parameter is None else parameter.to(dtype) for parameter in (weight, bias))
        y = torch.group_norm(h, groups, own_weight, own_bias, eps)
    else:
        y = torch.group_norm(h, groups, None, None, eps)
        y = y if weight is None else y * broadcast(weight[model_index])
        y = y if bias is None else y + broadcast(bias[model_index])
    if scale is not None:
        y = y * (1 + broadcast(scale))
    if shift is not None:
        y = y + broadcast(shift)
    return out.copy_(torch.nn.functional.silu(y) if silu else y)
