"""Images with a group each: what base, LOGO and unlearning runs are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guda_fast._validate import check_tensor, describe


@dataclass(frozen=True, eq=False)
class GroupedImages:
    """Training images and the group of each.

    images: [(N, C, H, W), float32, in [-1, 1]].
    labels: index into ``groups`` [(N,), int64].
    groups: distinct names.

    Raises TypeError or ValueError naming the argument; a group without images is an error.

    >>> data = GroupedImages(torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 1]), ("cat", "dog"))
    >>> len(data.only("dog")), len(data.without("dog"))
    (2, 1)
    """

    images: Tensor
    labels: Tensor
    groups: tuple[str, ...]

    def __post_init__(self) -> None:
        where = "GroupedImages"
        check_tensor(where, "images", self.images, shape=(None,) * 4, dtypes=(torch.float32,))
        check_tensor(where, "labels", self.labels, shape=(len(self.images),), dtypes=(torch.int64,))
        if len(set(self.groups)) != len(self.groups):
            raise ValueError(f"{where}: groups must be distinct names, got {describe(self.groups)}")
        if not bool(torch.isfinite(self.images).all()):
            raise ValueError(f"{where}: images must be finite, got NaN or infinity")
        if len(self.labels) and not (int(self.labels.min()) >= 0 and int(self.labels.max()) < len(self.groups)):
            raise ValueError(f"{where}: labels must be between 0 and {len(self.groups) - 1}")
        for group, count in zip(self.groups, self.counts(), strict=True):
            if count == 0:
                raise ValueError(f"{where}: every group must have images, got none for {group!r}")

    def __len__(self) -> int:
        return len(self.images)

    def counts(self) -> Sequence[int]:
        """Images in each group."""
        counts: list[int] = torch.bincount(self.labels, minlength=len(self.groups)).tolist()
        return counts

    def only(self, group: str) -> Tensor:
        """The images of one group, D_k [(N_k, C, H, W)]."""
        return self.images[self.labels == self.index(group)]

    def without(self, group: str) -> Tensor:
        """The images of all other groups, D_r [(N - N_k, C, H, W)]; ValueError if there are none."""
        rest = self.images[self.labels != self.index(group)]
        if len(rest) == 0:
            raise ValueError(f"GroupedImages: group {group!r} holds all {len(self)} images, nothing remains without it")
        return rest

    def index(self, group: str) -> int:
        """The index of a group name, or ValueError naming the choices."""
        if group not in self.groups:
            raise ValueError(f"GroupedImages: group must be one of {', '.join(self.groups)}, got {group!r}")
        return self.groups.index(group)
