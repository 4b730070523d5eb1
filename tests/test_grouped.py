"""GroupedImages: groups, their complements, and what is refused."""

from __future__ import annotations

import pytest
import torch

from guda_fast.datasets import GroupedImages, load_digits

IMAGES, LABELS, GROUPS = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 1, 0]), ("cat", "dog")


def test_digits_are_scikit_learns() -> None:
    data = load_digits()
    assert data.images.shape == (1797, 1, 8, 8)
    assert (data.images.min(), data.images.max()) == (-1, 1)
    assert sum(data.counts()) == 1797
    assert len(data.only("3")) == 183 and len(data.without("3")) == 1797 - 183


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((IMAGES[:, 0], LABELS, GROUPS), ValueError, r"images must have shape \(\*, \*, \*, \*\)"),
        ((IMAGES.double(), LABELS, GROUPS), TypeError, "images must be float32"),
        ((IMAGES, LABELS[:3], GROUPS), ValueError, "labels must have shape"),
        ((IMAGES, LABELS + 1, GROUPS), ValueError, "labels must be between 0 and 1"),
        ((IMAGES, LABELS, ("cat", "cat")), ValueError, "groups must be distinct"),
        ((IMAGES, LABELS, ("cat", "dog", "eel")), ValueError, "every group must have images, got none for 'eel'"),
        ((IMAGES * torch.nan, LABELS, GROUPS), ValueError, "images must be finite"),
    ],
)
def test_errors(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        GroupedImages(*arguments)


def test_unknown_groups_and_a_group_that_is_everything() -> None:
    data = GroupedImages(IMAGES, LABELS, GROUPS)
    with pytest.raises(ValueError, match="group must be one of cat, dog, got 'eel'"):
        data.only("eel")
    with pytest.raises(ValueError, match="group 'cat' holds all 4 images"):
        GroupedImages(IMAGES, LABELS * 0, ("cat",)).without("cat")
