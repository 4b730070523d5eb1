"""CIFAR-10: RGB images of 32x32 pixels in ten classes, from a copy as Python pickles or as folders of PNGs."""

from __future__ import annotations

import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import torch

from guda_fast._validate import check_choice
from guda_fast.datasets.folder import load_folder
from guda_fast.datasets.grouped import GroupedImages

GROUPS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLITS = {"train": ("train",), "test": ("test",), "all": ("train", "test")}
_FILES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_MOST = 10_000  # images of a file
_MOST_BYTES = 2**26  # of a file, which has 31 MB
_WHERE = "load_cifar10"


def load_cifar10(folder: str | os.PathLike[str], *, split: str = "train") -> GroupedImages:
    """CIFAR-10, grouped by class, as uint8.

    folder: with ``data_batch_1`` to ``data_batch_5`` and ``test_batch``, the "python version", of which groups have the
        names of the classes; or with the folders ``train`` and ``test`` of ten folders with images, by class; or
        with ten such folders alone, which are taken whatever ``split`` is
    split: "train" (50,000 images), "test" (10,000) or "all", in this order

    A pickle is read as data: it can name numpy's arrays and nothing else, and no code of its choice runs.

    Raises FileNotFoundError for what is not there, ValueError naming a damaged file with what was expected.
    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images".

    >>> load_cifar10("cifar-10-batches-py").images.shape  # doctest: +SKIP
    torch.Size([50000, 3, 32, 32])
    """
    check_choice(_WHERE, "split", split, SPLITS)
    source = Path(folder)
    if not source.is_dir():
        raise FileNotFoundError(f"{_WHERE}: folder must hold CIFAR-10, found no folder {source}")
    if any((source / name).exists() for names in _FILES.values() for name in names):
        return _of_batches(source, split)
    return _of_folders(source, split)


def _of_batches(folder: Path, split: str) -> GroupedImages:
    names = [name for part in SPLITS[split] for name in _FILES[part]]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: must hold {', '.join(names)}, found no {', '.join(missing)}")
    parts = [_batch(folder / name) for name in names]
    labels = torch.tensor([label for _, found in parts for label in found])
    absent = [group for number, group in enumerate(GROUPS) if not bool((labels == number).any())]
    if absent:
        raise ValueError(f"{folder}: must have images of all {len(GROUPS)} classes, found none of {', '.join(absent)}")
    return GroupedImages.by_label(torch.cat([images for images, _ in parts]), labels, GROUPS)


def _of_folders(folder: Path, split: str) -> GroupedImages:
    split_folders = any((folder / name).is_dir() for name in SPLITS["all"])
    parts = [folder / name for name in SPLITS[split]] if split_folders else [folder]
    found = [load_folder(part, channels=3) for part in parts]
    for part, data in zip(parts, found, strict=True):
        if data.images.shape[1:] != _SHAPE or len(data.groups) != len(GROUPS):
            raise ValueError(
                f"{part}: must have images of 32 x 32 pixels in {len(GROUPS)} folders, found "
                f"{' x '.join(map(str, data.images.shape[2:]))} in {len(data.groups)}"
            )
    return _joined(found)


def _joined(parts: list[GroupedImages]) -> GroupedImages:
    """The images of all parts, with the groups of each name put together."""
    if len({data.groups for data in parts}) != 1:
        raise ValueError(f"{_WHERE}: train and test must have the same class folders, got others")
    starts = [sum(len(data) for data in parts[:number]) for number in range(len(parts))]
    members = {
        group: torch.cat([data.members[group] + start for data, start in zip(parts, starts, strict=True)])
        for group in parts[0].groups
    }
    return GroupedImages(torch.cat([data.images for data in parts]), members)


def _batch(path: Path) -> tuple[torch.Tensor, list[int]]:
    """Images [(N, 3, 32, 32), uint8] and labels of one file."""
    found = _unpickled(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a dictionary, found {type(found).__name__}")
    # Python 2's text comes as bytes, Python 3's as text.
    entries = {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in found.items()}
    data, labels = entries.get("data"), entries.get("labels")
    if not isinstance(data, _Array) or not data.is_whole():
        raise ValueError(f"{path}: must have data of N x {_PIXELS} bytes with N from 1 to {_MOST}, found none such")
    if not isinstance(labels, list) or any(type(one) is not int or not 0 <= one < len(GROUPS) for one in labels):
        raise ValueError(f"{path}: must have labels, a list of integers of 0 to {len(GROUPS) - 1}, found none such")
    images = torch.frombuffer(bytearray(data.content), dtype=torch.uint8).reshape(-1, *_SHAPE)
    if len(labels) != len(images):
        raise ValueError(f"{path}: must have a label for each of its {len(images)} images, found {len(labels)}")
    return images, labels


class _Dtype:
    """What a pickle says of an array's type."""

    def __init__(self, kind: object = None, *_: object) -> None:
        self.kind = kind

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which single bytes do not have."""


class _Array:
    """What a pickle says of an array; nothing is made of it before it is found to be what it should be."""

    def __init__(self, *_: object) -> None:
        self.shape: object = None
        self.kind: object = None
        self.order: object = None
        self.content: Any = None

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) == 5:
            _, self.shape, dtype, self.order, self.content = state
            self.kind = getattr(dtype, "kind", None)

    def is_whole(self) -> bool:
        """Whether it has some images, in rows of bytes one after another."""
        if self.kind not in ("u1", b"u1", "uint8", b"uint8") or self.order not in (False, 0, "C", b"C"):
            return False
        if not isinstance(self.content, bytes | bytearray) or not isinstance(self.shape, tuple):
            return False
        count = len(self.content) // _PIXELS
        return 1 <= count <= _MOST and self.shape == (count, _PIXELS) and len(self.content) == count * _PIXELS


def _from_buffer(*arguments: Any) -> _Array:
    """Numpy's arrays in protocol 5: (content, type, shape, order)."""
    array = _Array()
    if len(arguments) == 4:
        content, dtype, shape, order = arguments
        content = bytes(content) if isinstance(content, bytearray) else content
        array.__setstate__((1, shape, dtype, order, content))
    return array


def _encoded(text: object = "", encoding: object = "latin1") -> bytes:
    """Bytes as Python 3 writes them for protocol 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes must be text in latin1")
    return text.encode("latin-1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encoded,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _DataUnpickler(pickle.Unpickler):
    """Gives stand-ins for numpy's arrays, and refuses everything else that a pickle may name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _KNOWN[module, name]


def _unpickled(path: Path) -> Any:
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"{path}: must be a file of CIFAR-10, of at most {_MOST_BYTES} bytes, found {size}")
    with path.open("rb") as file:
        try:
            _check_memo(file.read())
            file.seek(0)
            return _DataUnpickler(file, encoding="bytes").load()
        except (
            pickle.UnpicklingError,
            ValueError,
            EOFError,
            TypeError,
            AttributeError,
            IndexError,
            KeyError,
            OverflowError,
            RecursionError,
            MemoryError,
        ) as error:  # fmt: skip  (all that damaged or hostile pickles raise)
            raise ValueError(f"{path}: must be a pickle of CIFAR-10's arrays, found another file ({error})") from error


def _check_memo(content: bytes) -> None:
    """The unpickler makes a table as long as the largest number under which a pickle remembers something."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            raise ValueError(f"it remembers under number {argument}")
