"""Control groups: random subsets that are unlearned as the groups are, for the null distribution of scores."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median_low

import torch
from torch import Tensor

from guda_fast._validate import check_int
from guda_fast.datasets.grouped import GroupedImages

_WHERE = "with_controls"


def with_controls(data: GroupedImages, count: int, *, size: int | None = None, seed: int = 0) -> GroupedImages:
    """The data with ``count`` control groups more, named control-0, control-1 and so on.

    A control is drawn uniformly from the sets of ``size`` of all images, of any group and of none; it equals no other
    control and no group. The first controls are the same whatever ``count`` is. What unlearning one does to a query
    is what as many images do that have nothing in common.

    data: the groups to be matched; those that are controls already do not count
    count: how many controls [>= 1]
    size: images of each control [1..N-1; by default the lower median of the groups' sizes]. One size for all: where
        groups differ much in size, the controls match those near the median only, and a p-value of a larger group is
        too small, of a smaller one too large. Make controls of another size for them.
    seed: of the drawing [0..2^63-1]

    Returns the data with ``controls`` named. Raises TypeError or ValueError naming the argument: also where so many
    distinct subsets do not exist, or a group has a control's name.

    >>> data = GroupedImages(torch.zeros(6, 1, 8, 8), {"cat": torch.tensor([0, 1]), "dog": torch.tensor([2, 3, 4])})
    >>> with_controls(data, 2).counts()
    {'cat': 2, 'dog': 3, 'control-0': 2, 'control-1': 2}
    """
    check_int(_WHERE, "count", count, 1)
    check_int(_WHERE, "seed", seed, 0)
    names = tuple(f"control-{number}" for number in range(count))
    taken = [name for name in names if name in data.members]
    if taken:
        raise ValueError(f"{_WHERE}: data must have no group of a control's name, got {', '.join(taken)}")
    if size is None:
        size = matched_size(data)
    check_int(_WHERE, "size", size, 1, len(data) - 1)
    known = {_key(index) for index in data.members.values() if len(index) == size}
    possible = math.comb(len(data), size) - len(known)
    if possible < count:
        raise ValueError(f"{_WHERE}: count must be at most {possible}, the other sets of {size} images, got {count}")
    generator = torch.Generator().manual_seed(seed)
    members = dict(data.members)
    for name in names:
        members[name] = _drawn(len(data), size, generator, known)
    return replace(data, members=members, controls=(*data.controls, *names))


def matched_size(data: GroupedImages) -> int:
    """The lower median of the sizes of the groups that are no controls; ValueError where there are none."""
    sizes = [len(index) for group, index in data.members.items() if group not in data.controls]
    if not sizes:
        raise ValueError(f"{_WHERE}: data must have groups to be matched, got none")
    return median_low(sizes)


def _drawn(images: int, size: int, generator: torch.Generator, known: set[bytes]) -> Tensor:
    """A set that is not yet known."""
    while True:
        index = torch.randperm(images, generator=generator)[:size].sort().values
        key = _key(index)
        if key not in known:
            known.add(key)
            return index


def _key(index: Tensor) -> bytes:
    return index.numpy().tobytes()
