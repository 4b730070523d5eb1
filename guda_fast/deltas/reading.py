"""Reading one tensor's bytes from a file, into memory of its own: a mapping would stay resident once touched."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from guda_fast.errors import CheckpointError


def read_tensor(
    descriptor: int, path: Path, key: str, start: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """The tensor [shape, dtype, on the CPU] whose bytes begin at ``start``; no other byte is read.

    Raises CheckpointError naming the path and the key where they cannot be read, or are not all there.
    """
    # On the CPU, whatever torch's default device is.
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    rest = tensor.view(-1).view(torch.uint8).numpy().data
    while rest:
        try:
            count = os.preadv(descriptor, [rest], start)
        except OSError as error:
            raise CheckpointError(f"{path}: key {key!r} cannot be read: {error}") from error
        if count == 0:
            raise CheckpointError(f"{path}: key {key!r} cannot be read: the file was cut off")
        start, rest = start + count, rest[count:]
    return tensor
