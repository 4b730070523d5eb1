"""GroupedImages: groups, their complements, labels, fewer images, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guda_fast.datasets import GroupedImages, load_digits, thinned, with_labels
from guda_fast.diffusion.conditions import Conditions

IMAGES = torch.zeros(4, 1, 2, 2)
CAT, DOG = torch.tensor([0, 3]), torch.tensor([1, 2])
LABELS = Conditions({"class_labels": torch.arange(2)}, torch.tensor([0, 1, 1, 0]))


def test_digits_are_scikit_learns() -> None:
    from sklearn import datasets

    found, data = datasets.load_digits(), load_digits()
    np.testing.assert_array_equal((data.images[:, 0].numpy() + 1) * 8, found.images)
    assert data.groups == tuple("0123456789")
    for digit in range(10):
        assert data.group(str(digit)).tolist() == np.flatnonzero(found.target == digit).tolist()


def test_groups_may_overlap_and_need_not_have_all_images() -> None:
    data = GroupedImages(IMAGES, {"cat": CAT, "pet": torch.tensor([0, 1])})
    assert data.counts() == {"cat": 2, "pet": 2}
    assert data.rest("cat").tolist() == [1, 2] and data.rest("pet").tolist() == [2, 3]


def test_pixels_become_values() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    data = GroupedImages(pixels, {"cat": torch.tensor([0])})
    expected = torch.arange(256, dtype=torch.float64).reshape(1, 1, 16, 16) / 127.5 - 1
    # Two roundings of float32, of numbers up to 2.
    torch.testing.assert_close(data.take(torch.tensor([0])).double(), expected, rtol=0, atol=2**-23)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((IMAGES[:, 0], {"cat": CAT}), ValueError, r"images must have shape \(\*, \*, \*, \*\)"),
        ((IMAGES.double(), {"cat": CAT}), TypeError, "images must be float32 or uint8"),
        ((IMAGES * torch.nan, {"cat": CAT}), ValueError, "images must be finite"),
        ((IMAGES, {"cat": CAT[:0]}), ValueError, "every group must have images, got none for 'cat'"),
        ((IMAGES, {"cat": CAT + 1}), ValueError, r"members\['cat'\] must be in \[0, 4\), got 4"),
        ((IMAGES, {"cat": CAT.flip(0)}), ValueError, r"members\['cat'\] must rise"),
        ((IMAGES, {"cat": CAT.int()}), TypeError, r"members\['cat'\] must be int64"),
        ((IMAGES[:3], {"dog": DOG}, LABELS), ValueError, "conditions must be those of 3 images, got 4"),
        ((IMAGES, {"cat": CAT}, LABELS, 2), ValueError, "null must be between 0 and 1, got 2"),
        ((IMAGES, {"cat": CAT}, None, 0), ValueError, "null and removed must come with conditions"),
        ((IMAGES, {"cat": CAT}, LABELS, None, torch.tensor([0])), ValueError, r"removed must have shape \(2,\)"),
        ((IMAGES, {"cat": CAT}, LABELS, None, torch.tensor([0, 2])), ValueError, r"removed must be in \[0, 2\), got 2"),
        ((IMAGES, {"cat": CAT}, None, None, None, ("eel",)), ValueError, "controls must be one of 'cat', got 'eel'"),
    ],
)
def test_errors(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        GroupedImages(*arguments)


def test_labels_index_the_groups() -> None:
    data = GroupedImages.by_label(IMAGES, torch.tensor([0, 1, 1, 0]), ("cat", "dog"))
    assert data.group("cat").tolist() == [0, 3] and data.group("dog").tolist() == [1, 2]
    for labels, groups, message in [
        ([0, 1, 1], ("cat", "dog"), "labels must have shape"),
        ([0, 1, 2, 0], ("cat", "dog"), r"labels must be in \[0, 2\), got 2"),
        ([0, 1, 1, 0], ("cat", "cat"), "groups must be distinct"),
        ([0, 1, 1, 0], ("cat", "dog", "eel"), "every group must have images, got none for 'eel'"),
    ]:
        with pytest.raises(ValueError, match=message):
            GroupedImages.by_label(IMAGES, torch.tensor(labels), groups)


def test_unknown_groups_and_a_group_that_is_everything() -> None:
    data = GroupedImages(IMAGES, {"cat": CAT, "all": torch.arange(4)})
    with pytest.raises(ValueError, match="group must be one of cat, all, got 'eel'"):
        data.group("eel")
    with pytest.raises(ValueError, match="group 'all' holds all 4 images"):
        data.rest("all")


def test_class_labels_are_the_numbers_of_groups() -> None:
    data = GroupedImages(IMAGES, {"dog": DOG, "cat": CAT})
    labelled = with_labels(data)
    assert labelled.conditions is not None and labelled.null is None
    assert labelled.conditions.tensors["class_labels"].tolist() == [0, 1]
    assert labelled.conditions.row.tolist() == [1, 0, 0, 1]
    with_null = with_labels(data, null=True)
    assert with_null.conditions is not None and with_null.conditions.keys == (0, 1, 2) and with_null.null == 2
    with pytest.raises(ValueError, match="groups must not overlap, got images of both 'cat' and 'pet'"):
        with_labels(GroupedImages(IMAGES, {"cat": CAT, "pet": torch.tensor([1, 3])}))
    with pytest.raises(ValueError, match="every image must have a group, got 2 of 4 without one"):
        with_labels(GroupedImages(IMAGES, {"cat": CAT}))


def test_fewer_images_keep_their_groups_and_conditions() -> None:
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None]
    conditions = Conditions({"class_labels": torch.arange(3)}, torch.tensor([0, 0, 1, 1, 2, 2]))
    members = {"a": torch.tensor([1, 2, 5]), "b": torch.tensor([4, 5]), "c": torch.tensor([2])}
    few = thinned(GroupedImages(images, members, conditions, null=2), 1)
    assert few.images.flatten().tolist() == [1, 2, 4]
    assert {group: index.tolist() for group, index in few.members.items()} == {"a": [0, 1], "b": [2], "c": [1]}
    assert few.conditions is not None and few.conditions.row.tolist() == [0, 1, 2] and few.conditions.count == 3
    assert few.null == 2
    with pytest.raises(ValueError, match="per_group must be at least 1"):
        thinned(few, 0)
