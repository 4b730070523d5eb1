"""Definition of the op `add_noise`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from guda_fast.reference.philox import TILE_ELEMENTS, standard_normals


def add_noise(
    x0: Tensor,
    query_index: Tensor,
    query_id: Tensor,
    timestep: Tensor,
    sample: Tensor,
    x0_scale: Tensor,
    eps_scale: Tensor,
    *,
    seed: int,
    antithetic: bool = False,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Noised queries, one a row; arguments as in `guda_fast.ops.add_noise`, not checked here.

    out[r] = x0_scale[r] x0[query_index[r]] + eps_scale[r] eps(seed, query_id[r], timestep[r], sample[r])

    dtype: of the computation; x0's own by default, float64 for the exact value of float32 arguments

    Returns out, or a new tensor [(R, *S), dtype].
    """
    dtype = dtype or x0.dtype
    rows, shape = query_index.shape[0], x0.shape[1:]
    if out is None:
        out = torch.empty((rows, *shape), dtype=dtype, device=x0.device)
    vectors = (query_index, query_id, timestep, sample, x0_scale, eps_scale)
    for tile in row_tiles(rows, shape.numel()):
        rows_of_tile = (vector[tile] for vector in vectors)
        noisy = noisy_rows(x0, *rows_of_tile, seed=seed, antithetic=antithetic, dtype=dtype)
        part = out[tile]
        part.copy_(noisy.reshape(part.shape))
    return out


def row_tiles(rows: int, elements: int) -> Iterator[slice]:
    """Slices of rows that keep what is computed at once near `TILE_ELEMENTS`, however many rows there are."""
    step = max(1, TILE_ELEMENTS // max(elements, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def noisy_rows(
    x0: Tensor,
    query_index: Tensor,
    query_id: Tensor,
    timestep: Tensor,
    sample: Tensor,
    x0_scale: Tensor,
    eps_scale: Tensor,
    *,
    seed: int,
    antithetic: bool,
    dtype: torch.dtype,
) -> Tensor:
    """x0_scale x0 + eps_scale eps for a few rows, flattened in logical order [(R, elements), dtype]."""
    elements = x0.shape[1:].numel()
    noise = standard_normals(query_id, timestep, sample, elements, seed=seed, antithetic=antithetic, dtype=dtype)
    noise *= eps_scale.to(dtype)[:, None]
    scale = x0_scale.to(dtype)[:, None]
    signal = x0[query_index].flatten(1).to(dtype) * scale
    # A row without x0 must not see it: 0 * nan is nan. Two products and a sum, never contracted to an fma.
    return torch.where(scale == 0, noise, signal + noise)
