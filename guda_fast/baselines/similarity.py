"""Cosine similarity of a query to the images of each group, on pixels or on given features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guda_fast._validate import check_choice, check_index_range, check_int, check_tensor
from guda_fast.datasets.grouped import GroupedImages

REDUCTIONS = ("mean", "max", "top-k", "centroid")
_EXAMPLES_AT_ONCE = _QUERIES_AT_ONCE = 1024
_Take = Callable[[Tensor], Tensor]


def similarity(
    queries: Tensor,
    examples: Tensor,
    members: Mapping[str, Tensor],
    *,
    reduce: str = "mean",
    k: int = 10,
    device: torch.device | str | None = None,
) -> NDArray[np.float64]:
    """Cosine similarity of each query to each group, over the group's examples.

        mean over x in D_k of cos(q, x),   their maximum,   the mean of the k highest,   or cos(q, mean of D_k)

    A vector of zeros has similarity 0 to all others. Products are in float64, some examples and some queries at a time:
    besides the arguments only the queries' directions and the groups' means are held, whatever M is.

    queries: features of the queries [(N, ...), floating point, finite]
    examples: features of the training data, of the same kind [(M, ...), floating point, finite]
    members: which examples each group has [(M_k,) each: int64, M_k >= 1, K >= 1]
    reduce: over a group's examples, "mean", "max", "top-k" or "centroid"
    k: of "top-k"; a group with fewer examples has the mean of all [>= 1]
    device: of the products, which must have float64; examples that are elsewhere are copied there in turn [that of the
        queries]
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
    return _similarity(where, queries, lambda index: examples[index], members, reduce, k, device)


def pixel_similarity(
    queries: Tensor,
    data: GroupedImages,
    *,
    reduce: str = "mean",
    k: int = 10,
    device: torch.device | str | None = None,
) -> NDArray[np.float64]:
    """``similarity`` on pixels in [-1, 1], where 0 is middle grey.

    queries: images [(N, C, H, W), floating point, in [-1, 1], C x H x W as the data's]
    data: the training images and their groups
    reduce, k, device: as for ``similarity``, over a group's images
    Returns: scores [(N, K), float64, -1 to 1], groups in the order of ``data.groups``
    Raises: TypeError, ValueError naming the argument

    >>> data = GroupedImages(torch.ones(2, 1, 8, 8), {"white": torch.tensor([0, 1])})
    >>> pixel_similarity(-torch.ones(1, 1, 8, 8), data)
    array([[-1.]])
    """
    where = "pixel_similarity"
    shape = (None, *data.images.shape[1:])
    check_tensor(where, "queries", queries, shape=shape, dtypes=(torch.float32, torch.float64))
    return _similarity(where, queries, data.take, data.members, reduce, k, device)


def _similarity(
    where: str,
    queries: Tensor,
    take: _Take,
    members: Mapping[str, Tensor],
    reduce: str,
    k: int,
    device: torch.device | str | None,
) -> NDArray[np.float64]:
    check_choice(where, "reduce", reduce, REDUCTIONS)
    check_int(where, "k", k, 1)
    if not members:
        raise ValueError(f"{where}: members must have at least one group, got none")
    _check_finite(where, "queries", queries)
    for group, index in members.items():
        if len(index) == 0:
            raise ValueError(f"{where}: members must have an example of every group, got none for {group!r}")
    place = queries.device if device is None else torch.device(device)
    directions = torch.cat([_directions(part, place) for part in queries.split(_QUERIES_AT_ONCE)])
    groups = list(members.values())
    if reduce in ("mean", "centroid"):
        scores = directions @ torch.stack([_centre(index, take, reduce, place) for index in groups]).T
    else:
        scores = _highest(directions, groups, take, 1 if reduce == "max" else k)
    return scores.cpu().numpy()


def _centre(index: Tensor, take: _Take, reduce: str, device: torch.device) -> Tensor:
    """What has the group's score as its product with a query's direction [(F,)]."""
    parts = (take(part) for part in index.split(_EXAMPLES_AT_ONCE))
    if reduce == "mean":
        # The mean of the cosines is the product with the mean direction.
        return torch.stack([_directions(part, device).sum(dim=0) for part in parts]).sum(dim=0) / len(index)
    sums = [_rows(part, device).sum(dim=0) for part in parts]
    return _directions(torch.stack(sums).sum(dim=0)[None] / len(index), device)[0]


class _Part(NamedTuple):
    """Some examples of a group, and whether they are its last."""

    column: int
    members: Tensor
    last: bool


def _packs(groups: Sequence[Tensor]) -> Iterator[list[_Part]]:
    """All groups in order, so many examples at a time: small groups share a product, large ones take several."""
    pack: list[_Part] = []
    for column, index in enumerate(groups):
        split = index.split(_EXAMPLES_AT_ONCE)
        for number, part in enumerate(split, start=1):
            if pack and sum(len(other.members) for other in pack) + len(part) > _EXAMPLES_AT_ONCE:
                yield pack
                pack = []
            pack.append(_Part(column, part, number == len(split)))
    yield pack


def _highest(directions: Tensor, groups: Sequence[Tensor], take: _Take, count: int) -> Tensor:
    """The mean of so many highest cosines with each group's examples, or of all where there are fewer [(N, K)]."""
    scores = directions.new_empty((len(directions), len(groups)))
    kept = directions.new_empty((len(directions), 0))  # of a group whose examples are not yet all seen
    for pack in _packs(groups):
        block = _directions(take(torch.cat([part.members for part in pack])), directions.device)
        unfinished = []
        chunks = (value.split(_QUERIES_AT_ONCE) for value in (directions, kept, scores))
        for some, known, out in zip(*chunks, strict=True):
            cosines = (some @ block.T).split([len(part.members) for part in pack], dim=1)
            # Only a pack's first part can go on with a group of the pack before.
            for part, own in zip(pack, (torch.cat([known, cosines[0]], dim=1), *cosines[1:]), strict=True):
                best = _best(own, count)
                if part.last:
                    out[:, part.column] = best.mean(dim=1)
                else:
                    unfinished.append(best)
        kept = torch.cat(unfinished) if unfinished else directions.new_empty((len(directions), 0))
    return scores


def _best(cosines: Tensor, count: int) -> Tensor:
    """So many highest of each row, in any order, or all where there are fewer."""
    if count == 1:
        return cosines.amax(dim=1, keepdim=True)
    return cosines.topk(min(count, cosines.shape[1]), dim=1, sorted=False).values


def _rows(values: Tensor, device: torch.device) -> Tensor:
    return values.detach().to(device, torch.float64).flatten(1)


def _directions(values: Tensor, device: torch.device) -> Tensor:
    """Each row scaled to length 1, in float64; zeros stay zeros."""
    rows = _rows(values, device)
    # By its largest element first: squares of tiny or huge values leave the range of float64.
    rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths.clamp_min(torch.finfo(torch.float64).tiny)


def _check_finite(where: str, name: str, values: Tensor) -> None:
    # Some at a time: for all of them it would make a copy of the data.
    if not all(bool(torch.isfinite(part).all()) for part in values.split(_EXAMPLES_AT_ONCE)):
        raise ValueError(f"{where}: {name} must be finite, got NaN or infinity")
