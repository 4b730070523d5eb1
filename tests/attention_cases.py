"""Inputs of `attention`, and the bound on its error: twice that of PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from guda_fast import _backends, ops, reference


def make(
    rows: int,
    heads: int,
    queries: int,
    keys: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as diffusers makes them: views of (rows, positions, heads, dim) memory. size scales the scores."""
    random = torch.Generator().manual_seed(queries + 3 * keys + 5 * dim)

    def tokens(positions: int) -> Tensor:
        return torch.randn(rows, positions, heads, dim, generator=random)

    q, k, v = tokens(queries) * size, tokens(keys), tokens(keys)
    return q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2)


def in_token_order(out: Tensor) -> bool:
    """Whether (rows, heads, positions, dim) lies in memory as (rows, positions, heads, dim)."""
    return out.transpose(1, 2).is_contiguous()


def assert_within_twice_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    run: Callable[..., Tensor] = ops.attention,
) -> None:
    """The largest and the root mean square error; one rounding of the result is granted where eager is exact.

    The baseline has no fused multiply-add, which eager has: as many roundings again, so twice the largest error,
    and the root of two in the mean of squares.
    """
    exact = reference.attention(q, k, v, scale=scale, dtype=torch.float64)
    ours, eager = run(q, k, v, scale=scale), F.scaled_dot_product_attention(q, k, v, scale=scale)
    assert ours.dtype == q.dtype
    error, rival = (ours.double() - exact).abs(), (eager.double() - exact).abs()
    rounding = torch.finfo(q.dtype).eps / 2
    roundings = 2 if _backends.native_detail() == "baseline" else 1
    largest = 2 * roundings * rival.max() + rounding * exact.abs().max()
    mean = 2 * roundings**0.5 * rival.square().mean().sqrt() + rounding * exact.square().mean().sqrt()
    assert float(error.max()) <= float(largest)
    assert float(error.square().mean().sqrt()) <= float(mean)
