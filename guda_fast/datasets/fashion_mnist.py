"""Fashion-MNIST: grey images of 28x28 pixels in ten kinds of clothing, from gzip or plain IDX files."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guda_fast._validate import check_choice, describe
from guda_fast.datasets.grouped import GroupedImages

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""

GROUPS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
SIZES = (28, 32, 16)
SPLITS = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}
_MOST = {"train": 60_000, "t10k": 10_000}
_WHERE = "load_fashion_mnist"
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
_UINT8 = 8  # IDX's code of the type


def load_fashion_mnist(
    folder: str | os.PathLike[str] | None = None, *, size: int = 28, split: str = "train"
) -> GroupedImages:
    """Fashion-MNIST, grouped by kind of clothing, as uint8.

    folder: with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-...``, each with ``.gz`` or without
        [the one of Debian's package dataset-fashion-mnist]
    size: 28; 32, with two black pixels on each side; or 16, the means of 2x2 pixels of those of 32, rounded half up
    split: "train" (60,000 images), "test" (10,000) or "all", in this order

    Raises FileNotFoundError for a file that is not there, ValueError naming a damaged one with what was expected.
    Source: Xiao, Rasul and Vollgraf 2017 (arXiv 1708.07747).

    >>> load_fashion_mnist(size=16).images.shape  # doctest: +SKIP
    torch.Size([60000, 1, 16, 16])
    """
    if size not in SIZES:
        raise ValueError(f"{_WHERE}: size must be {SIZES[0]}, {SIZES[1]} or {SIZES[2]}, got {describe(size)}")
    check_choice(_WHERE, "split", split, SPLITS)
    source = DEBIAN_FOLDER if folder is None else Path(folder)
    if not source.is_dir():
        more = "; install Debian's package dataset-fashion-mnist, or give the folder" if folder is None else ""
        raise FileNotFoundError(f"{_WHERE}: folder must hold Fashion-MNIST's files, found no folder {source}{more}")
    parts = [_part(source, name) for name in SPLITS[split]]
    images = torch.cat([_resized(torch.from_numpy(images)[:, None], size) for images, _ in parts])
    labels = torch.cat([torch.from_numpy(labels).long() for _, labels in parts])
    missing = [group for number, group in enumerate(GROUPS) if not bool((labels == number).any())]
    if missing:
        raise ValueError(f"{source}: must have images of all {len(GROUPS)} labels, found none of {', '.join(missing)}")
    return GroupedImages.by_label(images, labels, GROUPS)


def _part(folder: Path, name: str) -> tuple[Pixels, Pixels]:
    """Images [(N, 28, 28), uint8] and labels [(N,), uint8] of a split."""
    images_file, labels_file = (_found(folder, f"{name}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    images, labels = _idx(images_file, (28, 28), _MOST[name]), _idx(labels_file, (), _MOST[name])
    if len(images) != len(labels):
        raise ValueError(
            f"{labels_file}: must have a label for each of the {len(images)} images in {images_file.name}, "
            f"found {len(labels)}"
        )
    if labels.max() >= len(GROUPS):
        raise ValueError(f"{labels_file}: must have labels of 0 to {len(GROUPS) - 1}, found {labels.max()}")
    return images, labels


def _found(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder}: must hold {name}.gz or {name}, found neither")


def _idx(path: Path, shape: tuple[int, ...], most: int) -> Pixels:
    """The values of an IDX file [(N, *shape), uint8]. most: of N, so that no header can ask for all memory."""
    dimensions = 1 + len(shape)
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, _UINT8, dimensions)):
                raise ValueError(
                    f"{path}: must be an IDX file of bytes in {dimensions} dimensions, found one that begins with "
                    f"{header[:4].hex(' ') or 'nothing'}"
                )
            count, *found = struct.unpack(f">{dimensions}I", header[4:])
            if tuple(found) != shape or not 1 <= count <= most:
                wanted = " x ".join(map(str, (f"1 to {most}", *shape)))
                raise ValueError(f"{path}: must be of {wanted}, found {' x '.join(map(str, (count, *found)))}")
            size = count * math.prod(shape)
            values = file.read(size + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: must be a whole gzip file, found a damaged one ({error})") from error
    if len(values) != size:
        more = "more" if len(values) > size else f"{len(values)}"
        raise ValueError(f"{path}: must have {size} bytes after its header, found {more}")
    return np.frombuffer(bytearray(values), dtype=np.uint8).reshape(count, *shape)


def _resized(images: Tensor, size: int) -> Tensor:
    """[(N, 1, size, size), uint8] of [(N, 1, 28, 28), uint8]."""
    if size == 28:
        return images
    padded: Tensor = nn.functional.pad(images, (2, 2, 2, 2))
    if size == 32:
        return padded
    squares = padded.reshape(len(images), 1, 16, 2, 16, 2)
    sums = squares.sum(dim=(3, 5), dtype=torch.int16)
    return ((sums + 2) // 4).to(torch.uint8)
