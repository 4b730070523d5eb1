"""Cosine similarity of a query to the images of each group, on pixels or on given features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guda_fast._validate import check_choice, check_index_range, check_tensor
from guda_fast.datasets.grouped import GroupedImages

REDUCTIONS = ("mean", "max")
_EXAMPLES_AT_ONCE = 1024


def similarity(
    queries: Tensor, examples: Tensor, members: Mapping[str, Tensor], *, reduce: str = "mean"
) -> NDArray[np.float64]:
    """Cosine similarity of each query to each group, over the group's examples.

        mean over x in D_k of <q, x> / (|q| |x|),   or the maximum

    A vector of zeros has similarity 0 to all others.

    queries: features of the queries [(N, ...), floating point, finite]
    examples: features of the training data, of the same kind [(M, ...), floating point, finite]
    members: which examples each group has [(M_k,) each: int64, M_k >= 1, K >= 1]
    reduce: over a group's examples, "mean" or "max"
    Returns: scores [(N, K), float64, -1 to 1], groups in the order of ``members``
    Raises: TypeError, ValueError naming the argument

    >>> similarity(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 3.0]]), {"a": torch.tensor([0, 1])})
    array([[0.5],
           [0.5]])
    """
    where = "similarity"
    check_tensor(where, "queries", queries, min_dim=2, dtypes=(torch.float32, torch.float64))
    shape = (None, *queries.shape[1:])
    check_tensor(where, "examples", examples, shape=shape, dtypes=(torch.float32, torch.float64))
    _check_finite(where, "examples", examples)
    for group, index in members.items():
        check_tensor(where, f"members[{group!r}]", index, shape=(None,), dtypes=(torch.int64,))
        check_index_range(where, f"members[{group!r}]", index, len(examples) - 1)
    return _similarity(where, queries, lambda index: examples[index], members, reduce)


def pixel_similarity(queries: Tensor, data: GroupedImages, *, reduce: str = "mean") -> NDArray[np.float64]:
    """``similarity`` on pixels in [-1, 1], where 0 is middle grey.

    queries: images [(N, C, H, W), floating point, in [-1, 1], C x H x W as the data's]
    data: the training images and their groups
    reduce: over a group's images, "mean" or "max"
    Returns: scores [(N, K), float64, -1 to 1], groups in the order of ``data.groups``
    Raises: TypeError, ValueError naming the argument

    >>> data = GroupedImages(torch.ones(2, 1, 8, 8), {"white": torch.tensor([0, 1])})
    >>> pixel_similarity(-torch.ones(1, 1, 8, 8), data)
    array([[-1.]])
    """
    where = "pixel_similarity"
    shape = (None, *data.images.shape[1:])
    check_tensor(where, "queries", queries, shape=shape, dtypes=(torch.float32, torch.float64))
    return _similarity(where, queries, data.take, data.members, reduce)


def _similarity(
    where: str, queries: Tensor, take: Callable[[Tensor], Tensor], members: Mapping[str, Tensor], reduce: str
) -> NDArray[np.float64]:
    check_choice(where, "reduce", reduce, REDUCTIONS)
    if not members:
        raise ValueError(f"{where}: members must have at least one group, got none")
    _check_finite(where, "queries", queries)
    for group, index in members.items():
        if len(index) == 0:
            raise ValueError(f"{where}: members must have an example of every group, got none for {group!r}")
    directions = _directions(queries)
    columns = []
    for index in members.values():
        parts = _directions_of(index, take)
        if reduce == "mean":
            # The mean of the cosines is the product with the mean direction.
            column = directions @ (torch.stack([part.sum(dim=0) for part in parts]).sum(dim=0) / len(index))
        else:
            column = torch.stack([(directions @ part.T).amax(dim=1) for part in parts]).amax(dim=0)
        columns.append(column)
    return np.stack([column.numpy() for column in columns], axis=1)


def _directions_of(index: Tensor, take: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """The directions of a group's examples, some at a time, so that no copy of the data is made."""
    return (_directions(take(part)) for part in index.split(_EXAMPLES_AT_ONCE))


def _directions(values: Tensor) -> Tensor:
    """Each row scaled to length 1, in float64; zeros stay zeros."""
    rows = values.detach().cpu().double().flatten(1)
    # By its largest element first: squares of tiny or huge values leave the range of float64.
    rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths.clamp_min(torch.finfo(torch.float64).tiny)


def _check_finite(where: str, name: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{where}: {name} must be finite, got NaN or infinity")
