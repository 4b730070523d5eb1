"""Class-conditional data: each image is conditioned on the number of its group."""

from __future__ import annotations

from dataclasses import replace

import torch

from guda_fast.datasets.grouped import GroupedImages
from guda_fast.diffusion.conditions import Conditions

_WHERE = "with_labels"


def with_labels(data: GroupedImages, *, null: bool = False) -> GroupedImages:
    """The data with ``class_labels`` as conditions: 0 to K - 1 by group, in order.

    data: groups that do not overlap and have all images, controls aside; conditions that it has are replaced.
    null: append a label K that no image has, for what is trained without a condition.

    Returns the data for a model with ``num_class_embeds`` K, or K + 1. Raises ValueError naming the groups that
    overlap, or how many images have none.

    >>> members = {"cat": torch.tensor([0]), "dog": torch.tensor([1, 2])}
    >>> data = with_labels(GroupedImages(torch.zeros(3, 1, 8, 8), members), null=True)
    >>> data.conditions.row.tolist(), data.conditions.count, data.null
    ([0, 1, 1], 3, 2)
    """
    groups = [group for group in data.groups if group not in data.controls]
    row = torch.full((len(data),), -1, dtype=torch.int64)
    for label, group in enumerate(groups):
        index = data.members[group]
        other = row[index].amax()
        if other >= 0:
            raise ValueError(
                f"{_WHERE}: groups must not overlap, got images of both {groups[int(other)]!r} and {group!r}"
            )
        row[index] = label
    without = int((row < 0).sum())
    if without:
        raise ValueError(f"{_WHERE}: every image must have a group, got {without} of {len(data)} without one")
    labels = torch.arange(len(groups) + null)
    conditions = Conditions({"class_labels": labels}, row, tuple(labels.tolist()))
    return replace(data, conditions=conditions, null=len(groups) if null else None, removed=None)
