"""Manifests: hashes against ones written out, overlaps, and what does and does not change them."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace

import pytest
import torch

from guda_fast.datasets import GroupedImages, manifest, with_controls, with_labels
from guda_fast.diffusion.conditions import Conditions

VALUES = [[0.5, -1.0], [0.25, 0.0], [0.5, -1.0]]
IMAGES = torch.tensor(VALUES).reshape(3, 1, 1, 2)
MEMBERS = {"cat": torch.tensor([0, 1]), "dog": torch.tensor([1, 2])}
DATA = GroupedImages(IMAGES, MEMBERS)


def blake(content: bytes, size: int = 16):
    return hashlib.blake2b(content, digest_size=size)


def test_hashes_are_of_these_bytes() -> None:
    digests = [blake(b"float32 1,1,2 " + struct.pack("<2f", *values) + b"none").digest() for values in VALUES]
    found = manifest(DATA)
    assert found["images"] == {
        "count": 3,
        "shape": [1, 1, 2],
        "dtype": "float32",
        "distinct": 2,
        "without_group": 0,
        "hash": blake(b"".join(digests)).hexdigest(),
    }
    assert found["groups"] == {
        "cat": {"count": 2, "hash": blake(digests[0] + digests[1]).hexdigest()},
        "dog": {"count": 2, "hash": blake(digests[1] + digests[2]).hexdigest()},
    }
    assert found["conditions"] is None
    rest = {key: value for key, value in found.items() if key != "hash"}
    assert found["hash"] == blake(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    assert json.loads(json.dumps(found)) == found


def test_labels_enter_the_hash_of_an_image() -> None:
    labelled = GroupedImages(
        torch.tensor([[7, 9]], dtype=torch.uint8).reshape(1, 1, 1, 2),
        {"cat": torch.tensor([0])},
        Conditions({"class_labels": torch.tensor([4])}, torch.tensor([0]), (4,)),
    )
    digest = blake(b"uint8 1,1,2 " + bytes([7, 9]) + blake(b"int 4", 64).digest()).digest()
    assert manifest(labelled)["groups"]["cat"]["hash"] == blake(digest).hexdigest()


def test_overlaps_count_shared_images_and_equal_contents() -> None:
    assert manifest(DATA)["overlaps"] == [{"groups": ["cat", "dog"], "shared": 1, "equal": 2}]
    copies = replace(DATA, members={"cat": torch.tensor([0]), "dog": torch.tensor([2])})
    assert manifest(copies)["overlaps"] == [{"groups": ["cat", "dog"], "shared": 0, "equal": 1}]
    assert manifest(copies)["images"]["without_group"] == 1
    apart = replace(DATA, members={"cat": torch.tensor([0]), "dog": torch.tensor([1])})
    assert manifest(apart)["overlaps"] == []


def test_controls_are_marked_and_their_overlaps_left_out() -> None:
    images = torch.arange(8, dtype=torch.uint8)[:, None, None, None]
    data = with_controls(GroupedImages(images, {"cat": torch.arange(4), "dog": torch.arange(4, 8)}), 2)
    found = manifest(data)
    assert [group for group, entry in found["groups"].items() if entry.get("control")] == ["control-0", "control-1"]
    assert found["overlaps"] == []


@pytest.mark.parametrize(
    "changed",
    [
        replace(DATA, images=IMAGES + 2**-24 * (IMAGES == 0.25)),
        replace(DATA, images=IMAGES.reshape(3, 1, 2, 1)),
        replace(DATA, members={"cat": MEMBERS["cat"], "eel": MEMBERS["dog"]}),
        replace(DATA, members=dict(reversed(MEMBERS.items()))),
        replace(DATA, members={"cat": torch.tensor([0]), "dog": MEMBERS["dog"]}),
        replace(DATA, conditions=Conditions({"class_labels": torch.tensor([0])}, torch.zeros(3, dtype=torch.int64))),
    ],
    ids=["value", "shape", "name", "order", "members", "conditions"],
)
def test_other_data_have_another_hash(changed: GroupedImages) -> None:
    assert manifest(changed)["hash"] != manifest(DATA)["hash"]


def test_equal_data_have_an_equal_manifest_however_they_lie_in_memory() -> None:
    negative_zero = torch.where(IMAGES == 0, -0.0, IMAGES)
    strided = negative_zero.repeat(1, 1, 1, 2)[..., :2]
    assert bool(torch.signbit(strided[1, 0, 0, 1])) and not strided.is_contiguous()
    assert manifest(replace(DATA, images=strided)) == manifest(DATA)


def test_conditions_count_by_their_keys_and_what_they_stand_for() -> None:
    row = torch.tensor([0, 1, 0])
    embedded = Conditions({"encoder_hidden_states": torch.rand(2, 3, 4)}, row, ("a cat", "a dog"), {"tokens": "x"})
    first = manifest(replace(DATA, conditions=embedded))
    noisy = replace(embedded, tensors={"encoder_hidden_states": torch.rand(2, 3, 4)})
    assert manifest(replace(DATA, conditions=noisy)) == first
    for other in [
        replace(embedded, keys=("a cat", "a cow")),
        replace(embedded, keys=None),
        replace(embedded, source={"tokens": "y"}),
        replace(embedded, row=row.flip(0).roll(1)),
    ]:
        assert manifest(replace(DATA, conditions=other))["hash"] != first["hash"]
    assert manifest(replace(DATA, conditions=embedded, null=1))["hash"] != first["hash"]
    assert manifest(replace(DATA, conditions=embedded, removed=row[:2]))["hash"] != first["hash"]


def test_labels_of_groups_are_recorded() -> None:
    data = replace(DATA, members={"cat": torch.tensor([0]), "dog": torch.tensor([1, 2])})
    found = manifest(with_labels(data, null=True))["conditions"]
    assert (found["count"], found["null"], found["tensors"]) == (3, 2, {"class_labels": []})
