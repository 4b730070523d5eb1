"""Definition of the op `denoising_error`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from guda_fast.reference.add_noise import noisy_rows, row_tiles


class DenoisingError(NamedTuple):
    """Weighted squared errors of M models at R rows, and their paired differences to model 0 where asked."""

    errors: Tensor  # (M, R) float64
    paired: Tensor | None  # (M, R) float64; row 0 is zero


def denoising_error(
    predictions: Tensor,
    x0: Tensor,
    query_index: Tensor,
    query_id: Tensor,
    timestep: Tensor,
    sample: Tensor,
    x0_scale: Tensor,
    eps_scale: Tensor,
    weight: Tensor,
    *,
    seed: int,
    antithetic: bool = False,
    paired: bool = False,
    dtype: torch.dtype | None = None,
) -> DenoisingError:
    """Squared errors against the regenerated target; arguments as in the op, not checked here.

    target[r] = x0_scale[r] x0[query_index[r]] + eps_scale[r] eps(seed, query_id[r], timestep[r], sample[r])
    errors[m, r] = weight[r] sum (p_m - target)^2
    paired[m, r] = weight[r] sum (p_m - p_0) ((p_m - target) + (p_0 - target))

    Differences are taken in `dtype` (x0's own by default), products and sums in float64.
    """
    dtype = dtype or x0.dtype
    models, rows = predictions.shape[:2]
    errors = torch.empty((models, rows), dtype=torch.float64, device=x0.device)
    differences = torch.zeros_like(errors) if paired else None
    vectors = (query_index, query_id, timestep, sample, x0_scale, eps_scale)
    for tile in row_tiles(rows, x0.shape[1:].numel()):
        rows_of_tile = (vector[tile] for vector in vectors)
        target = noisy_rows(x0, *rows_of_tile, seed=seed, antithetic=antithetic, dtype=dtype)
        for model in range(models):
            prediction = predictions[model, tile].reshape(target.shape).to(dtype)
            error = (prediction - target).double()
            errors[model, tile] = weight[tile] * _pairwise_sum(error * error)
            if differences is None:
                continue
            if model == 0:
                base_prediction, base_error = prediction, error
                continue
            product = (prediction - base_prediction).double() * (error + base_error)
            differences[model, tile] = weight[tile] * _pairwise_sum(product)
    return DenoisingError(errors, differences)


def _pairwise_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension by halving, in place: (R, elements) -> (R,).

    The order is fixed by the number of elements alone, so that results do not depend on the number of rows,
    threads or the device as those of `Tensor.sum` may.
    """
    size = values.shape[-1]
    if size == 0:
        return values.new_zeros(values.shape[:-1])
    while size > 1:
        half = (size + 1) // 2
        values[..., : size - half] += values[..., half:size]
        size = half
    return values[..., 0]
