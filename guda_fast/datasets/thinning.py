"""Fewer images of each group, for trials."""

from __future__ import annotations

from dataclasses import replace

import torch

from guda_fast._validate import check_int
from guda_fast.datasets.grouped import GroupedImages


def thinned(data: GroupedImages, per_group: int) -> GroupedImages:
    """The first ``per_group`` images of each group, and no others.

    A group that overlaps with others keeps what is kept of these too, and so may have more. Conditions stay as they
    are, with those that no image has any more, so that labels keep their meaning.

    per_group: [>= 1]. Raises TypeError or ValueError naming it.

    >>> members = {"cat": torch.tensor([0]), "dog": torch.tensor([1, 2])}
    >>> thinned(GroupedImages(torch.zeros(3, 1, 8, 8), members), 1).counts()
    {'cat': 1, 'dog': 1}
    """
    check_int("thinned", "per_group", per_group, 1)
    kept = torch.zeros(len(data), dtype=torch.bool)
    for index in data.members.values():
        kept[index[:per_group]] = True
    place = kept.cumsum(0) - 1
    members = {group: place[index[kept[index]]] for group, index in data.members.items()}
    conditions = data.conditions
    if conditions is not None:
        conditions = replace(conditions, row=conditions.row[kept])
    return replace(data, images=data.images[kept], members=members, conditions=conditions)
