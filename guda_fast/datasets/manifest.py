"""What a set of training data is, as JSON values: names, counts and hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import numpy as np
import torch

from guda_fast.datasets.grouped import GroupedImages
from guda_fast.diffusion.conditions import Conditions, flat

_DTYPES = {torch.float32: "float32", torch.uint8: "uint8"}


def manifest(data: GroupedImages) -> dict[str, Any]:
    """What the data are, as JSON values; equal data give an equal manifest on every machine.

    ``groups`` has count and hash of each group, in order; controls also have ``control`` true. ``overlaps`` has each
    pair of groups that share something: ``shared`` images of both, ``equal`` distinct contents of both. Equal contents
    that are not shared mean that what is unlearned in one group stays in the other. Control groups overlap with
    everything and are left out there. ``images`` counts all, those of no group (``without_group``) and the ``distinct``
    ones. ``hash`` is over all else here.

    A hash is BLAKE2b of 16 bytes, hexadecimal: of an image over its type, shape, pixels (uint8) or values (float32,
    little-endian, -0 as 0), and condition; of a group over its images' in order. A condition counts by its key where
    it has one, as a prompt or a class label: embeddings differ in their last digits from device to device.

    >>> found = manifest(GroupedImages(torch.zeros(2, 1, 8, 8), {"cat": torch.tensor([0]), "dog": torch.tensor([1])}))
    >>> found["groups"]["cat"]["count"], found["images"]["distinct"]
    (1, 1)
    """
    digests = _image_digests(data)
    groups: dict[str, dict[str, Any]] = {}
    for group, index in data.members.items():
        groups[group] = {"count": len(index), "hash": _hash(digests[i] for i in index.tolist())}
        if group in data.controls:
            groups[group]["control"] = True
    grouped = np.zeros(len(data), dtype=bool)
    for index in data.members.values():
        grouped[index.numpy()] = True
    made: dict[str, Any] = {
        "images": {
            "count": len(data),
            "shape": list(data.images.shape[1:]),
            "dtype": _DTYPES[data.images.dtype],
            "distinct": len(set(digests)),
            "without_group": int((~grouped).sum()),
            "hash": _hash(digests),
        },
        "conditions": None if data.conditions is None else _condition_record(data, data.conditions),
        "groups": groups,
        "overlaps": _overlaps(data, digests),
    }
    text = json.dumps(made, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return {**made, "hash": _hash([text.encode()])}


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _image_digests(data: GroupedImages) -> list[bytes]:
    """A hash of each image with its condition [N of 16 bytes]."""
    conditions = [b"none"] if data.conditions is None else _condition_digests(data.conditions)
    row = [0] * len(data) if data.conditions is None else data.conditions.row.tolist()
    header = f"{_DTYPES[data.images.dtype]} {','.join(map(str, data.images.shape[1:]))} ".encode()
    digests = []
    for image, number in zip(data.images, row, strict=True):
        values = image.numpy()
        # Adding 0 makes -0 of float32 values 0; what is equal has equal bytes then.
        values = values if values.dtype == np.uint8 else (values + np.float32(0)).astype("<f4")
        content = np.ascontiguousarray(values).tobytes()
        digests.append(hashlib.blake2b(header + content + conditions[number], digest_size=16).digest())
    return digests


def _condition_digests(conditions: Conditions) -> list[bytes]:
    """A hash of each distinct condition [U]."""
    if conditions.keys is None:
        return list(conditions.digests())
    return [hashlib.blake2b(f"{type(key).__name__} {key!r}".encode()).digest() for key in conditions.keys]


def _condition_record(data: GroupedImages, conditions: Conditions) -> dict[str, Any]:
    removed = None if data.removed is None else data.removed.tolist()
    return {
        "count": conditions.count,
        "tensors": {name: list(tensor.shape[1:]) for name, tensor in sorted(flat(conditions.tensors).items())},
        "hash": _hash(_condition_digests(conditions)),
        "null": data.null,
        "removed": None if removed is None else _hash([json.dumps(removed).encode()]),
        "source": dict(conditions.source),
    }


def _overlaps(data: GroupedImages, digests: list[bytes]) -> list[dict[str, Any]]:
    """Of each pair of groups with something in common, how much."""
    groups = [group for group in data.groups if group not in data.controls]
    indices = {group: set(data.members[group].tolist()) for group in groups}
    contents = {group: {digests[i] for i in indices[group]} for group in groups}
    found = []
    for first, second in combinations(groups, 2):
        equal = len(contents[first] & contents[second])
        if equal:
            shared = len(indices[first] & indices[second])
            found.append({"groups": [first, second], "shared": shared, "equal": equal})
    return found
