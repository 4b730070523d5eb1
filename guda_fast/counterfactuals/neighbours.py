"""Nearest neighbours among training images, once a run."""

from __future__ import annotations

import torch
from torch import Tensor

from guda_fast._validate import check_tensor
from guda_fast.datasets.grouped import GroupedImages

_DISTANCE_BLOCK_BYTES = 2**26


def retain_neighbours(
    where: str, data: GroupedImages, group: str, count: int, features: Tensor | None = None
) -> Tensor:
    """The nearest images outside of a group to each of its images, nearest first [(N_k, count), int64: images].

    where: for error texts. count: [1..N_r]. features: what Euclidean distance is taken on, a row an image
        [(N, D), floating, finite; None for the pixels]
    """
    forget, rest = data.group(group), data.rest(group)
    if features is None:
        return rest[nearest_neighbours(data.take(forget), data.take(rest), count)]
    check_tensor(where, "features", features, shape=(len(data), None))
    if not features.is_floating_point():
        raise TypeError(f"{where}: features must be floating, got {features.dtype}")
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{where}: features must be finite, got NaN or infinity")
    return rest[nearest_neighbours(features[forget], features[rest], count)]


def nearest_neighbours(queries: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The ``count`` nearest candidates of each query by Euclidean distance, nearest first [(N, count), int64]."""
    flat_queries, flat_candidates = queries.flatten(1), candidates.flatten(1)
    rows = max(1, _DISTANCE_BLOCK_BYTES // (flat_candidates.element_size() * len(flat_candidates)))
    blocks = [torch.cdist(block, flat_candidates).topk(count, largest=False) for block in flat_queries.split(rows)]
    return torch.cat([block.indices for block in blocks])
