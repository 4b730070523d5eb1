"""Nearest neighbours among training images, once a run."""

from __future__ import annotations

import torch
from torch import Tensor

from guda_fast._validate import check_tensor
from guda_fast.datasets.grouped import GroupedImages

_DISTANCE_BLOCK_BYTES = 2**26
_SPARE = 32  # candidates beyond the neighbours whose distances are computed exactly


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
    """The ``count`` nearest candidates of each query by Euclidean distance, nearest first [(N, count), int64].

    queries, candidates: [(N, ...), floating; in half precision they are compared in float32].
    """
    dtype = torch.promote_types(candidates.dtype, torch.float32)
    flat_queries, flat_candidates = queries.flatten(1).to(dtype), candidates.flatten(1).to(dtype)
    # cdist multiplies matrices, where close distances of vectors that are far from zero cancel: it proposes, around the
    # candidates' mean, and exact distances decide.
    mean = flat_candidates.mean(dim=0)
    centred = flat_candidates - mean
    proposed = min(len(centred), count + _SPARE)
    rows = max(1, _DISTANCE_BLOCK_BYTES // (centred.element_size() * len(centred)))
    found = []
    for block in flat_queries.split(rows):
        first = torch.cdist(block, flat_candidates).topk(count, largest=False).indices
        choice = torch.cdist(block - mean, centred).topk(proposed, largest=False).indices
        exact, order = _distances(block, flat_candidates, choice).sort(dim=1, stable=True)
        # Of candidates that are equally near, those that cdist gives: runs made before have drawn from them.
        as_near = (_distances(block, flat_candidates, first) == exact[:, :count]).all(dim=1, keepdim=True)
        found.append(torch.where(as_near, first, choice.gather(1, order[:, :count])))
    return torch.cat(found)


def _distances(queries: Tensor, candidates: Tensor, index: Tensor) -> Tensor:
    """Squared distances of queries to some candidates each, from differences [(N, M), float64]."""
    rows = max(1, _DISTANCE_BLOCK_BYTES // (candidates.element_size() * index.shape[1] * candidates.shape[1]))
    parts = zip(queries.split(rows), index.split(rows), strict=True)
    found = [(candidates[chosen] - part[:, None]).square_().sum(dim=2, dtype=torch.float64) for part, chosen in parts]
    return torch.cat(found)
