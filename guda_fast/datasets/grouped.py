"""Images with the groups that they belong to: what base, LOGO and unlearning runs are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guda_fast._validate import check_choice, check_index_range, check_int, check_tensor, describe
from guda_fast.diffusion.conditions import Conditions

_WHERE = "GroupedImages"


@dataclass(frozen=True, eq=False)
class GroupedImages:
    """Training images, the groups that they belong to, and what each is conditioned on.

    images: [(N, C, H, W), float32 in [-1, 1], or uint8 in 0..255 to save memory]
    members: which images each group has, by its name; groups may overlap, and need not have all images
        [(N_k,) each: int64, rising, N_k >= 1]
    conditions: of each image, for conditional models; may hold more than the images have [None for unconditional ones]
    null: the row of ``conditions`` that stands for no condition [None where there is none]
    removed: for each row of ``conditions`` the one that says the same without the group, as a prompt without its style;
        rows with the same one have the same object [(U,), int64; None where this is not known]
    controls: the groups that are random subsets, see ``with_controls`` [names in ``members``]

    Raises TypeError or ValueError naming the argument.

    >>> members = {"cat": torch.tensor([0]), "dog": torch.tensor([1, 2])}
    >>> data = GroupedImages(torch.zeros(3, 1, 8, 8), members)
    >>> len(data), data.counts(), data.rest("dog")
    (3, {'cat': 1, 'dog': 2}, tensor([0]))
    """

    images: Tensor
    members: Mapping[str, Tensor]
    conditions: Conditions | None = None
    null: int | None = None
    removed: Tensor | None = None
    controls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_tensor(_WHERE, "images", self.images, shape=(None,) * 4, dtypes=(torch.float32, torch.uint8))
        if self.images.is_floating_point() and not bool(torch.isfinite(self.images).all()):
            raise ValueError(f"{_WHERE}: images must be finite, got NaN or infinity")
        for group, index in self.members.items():
            name = f"members[{group!r}]"
            check_tensor(_WHERE, name, index, shape=(None,), dtypes=(torch.int64,))
            if len(index) == 0:
                raise ValueError(f"{_WHERE}: every group must have images, got none for {group!r}")
            check_index_range(_WHERE, name, index, len(self.images) - 1)
            if not bool((index[1:] > index[:-1]).all()):
                raise ValueError(f"{_WHERE}: {name} must rise, got {describe(index)}")
        self._check_conditions()
        for name in self.controls:
            check_choice(_WHERE, "controls", name, self.members)

    def _check_conditions(self) -> None:
        if self.conditions is None:
            if self.null is not None or self.removed is not None:
                raise ValueError(f"{_WHERE}: null and removed must come with conditions, got conditions None")
            return
        if len(self.conditions) != len(self.images):
            raise ValueError(f"{_WHERE}: conditions must be those of {len(self)} images, got {len(self.conditions)}")
        last = self.conditions.count - 1
        if self.null is not None:
            check_int(_WHERE, "null", self.null, 0, last)
        if self.removed is not None:
            check_tensor(_WHERE, "removed", self.removed, shape=(last + 1,), dtypes=(torch.int64,))
            check_index_range(_WHERE, "removed", self.removed, last)

    @classmethod
    def by_label(
        cls, images: Tensor, labels: Tensor, groups: Sequence[str], conditions: Conditions | None = None
    ) -> GroupedImages:
        """Groups that do not overlap, and have all images.

        labels: index into ``groups`` [(N,), int64]. groups: distinct names [K].
        """
        check_tensor(_WHERE, "labels", labels, shape=(len(images),), dtypes=(torch.int64,))
        check_index_range(_WHERE, "labels", labels, len(groups) - 1)
        if len(set(groups)) != len(groups):
            raise ValueError(f"{_WHERE}: groups must be distinct names, got {describe(tuple(groups))}")
        members = {group: (labels == k).nonzero().squeeze(1) for k, group in enumerate(groups)}
        return cls(images, members, conditions)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def groups(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(self.members)

    def counts(self) -> dict[str, int]:
        """Images in each group."""
        return {group: len(index) for group, index in self.members.items()}

    def take(self, index: Tensor) -> Tensor:
        """Some of the images [(B, C, H, W), float32, in [-1, 1]]. index: [(B,), int64]."""
        images = self.images[index]
        return images if images.is_floating_point() else images.float() / 127.5 - 1

    def group(self, name: str) -> Tensor:
        """The images of one group, D_k [(N_k,), int64, rising]; ValueError naming the choices."""
        if name not in self.members:
            raise ValueError(f"{_WHERE}: group must be one of {', '.join(self.members)}, got {name!r}")
        return self.members[name]

    def rest(self, name: str) -> Tensor:
        """All other images, D_r [(N - N_k,), int64, rising]; ValueError if there are none."""
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[self.group(name)] = False
        if not bool(kept.any()):
            raise ValueError(f"{_WHERE}: group {name!r} holds all {len(self)} images, nothing remains without it")
        return kept.nonzero().squeeze(1)
