"""Definition of the op `attention`."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Softmax attention of every head; arguments as in `guda_fast.ops.attention`, not checked here.

    out = softmax(scale q k^T) v, the softmax over the keys

    dtype: of the computation; float32 by default, float64 for float64 q and for the exact value

    Returns a new tensor [(B, H, L, D) in the memory order of (B, L, H, D), q's dtype, or `dtype` where given].
    """
    rows, heads, queries, dim = q.shape
    out = torch.empty((rows, queries, heads, dim), dtype=dtype or q.dtype, device=q.device).transpose(1, 2)
    dtype = dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)
    scale = default_scale(dim) if scale is None else scale
    scores = (q.to(dtype) @ k.to(dtype).transpose(2, 3)) * scale
    return out.copy_(scores.softmax(3) @ v.to(dtype))


def default_scale(dim: int) -> float:
    """1 / sqrt(dim), which keeps the variance of scores at that of the elements of q and k."""
    return float(dim) ** -0.5 if dim else 1.0
