"""Queries: the images or latents to attribute, with names, ids and duplicates found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from guda_fast._validate import check_int, describe
from guda_fast.datasets.conditions import ConditionSource, load_conditions
from guda_fast.diffusion.conditions import Conditions
from guda_fast.diffusion.query_id import query_id

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_MODES = {1: "L", 3: "RGB"}
_CONVERTIBLE = ("1", "L", "LA", "P", "RGB", "RGBA")

QuerySource = str | Path | Tensor | np.ndarray[Any, Any] | Sequence[str | Path | Image.Image]
"""A folder of images, float32 values (N, C, H, W), uint8 pixels (N, H, W) or (N, H, W, C), or a sequence of
image files or PIL images."""


@dataclass(frozen=True, eq=False)
class QuerySet:
    """Queries in the caller's order; duplicates share a row of x0.

    Queries are distinct where their images or their conditions are.

    x0: distinct queries [(U, C, H, W), float32]. ids: one a distinct query [U, 0..2^64-1].
    names: one a query [N]. row: the row of x0 of each query [(N,), int64].
    conditions: of the U distinct queries.
    """

    x0: Tensor
    ids: tuple[int, ...]
    names: tuple[str, ...]
    row: np.ndarray[Any, np.dtype[np.int64]]
    conditions: Conditions

    def __len__(self) -> int:
        return len(self.names)

    @property
    def query_ids(self) -> tuple[int, ...]:
        """The id of each query, duplicates included [N]."""
        return tuple(self.ids[index] for index in self.row)

    @property
    def distinct_names(self) -> tuple[str, ...]:
        """The name under which each row of x0 came first."""
        _, first = np.unique(self.row, return_index=True)
        return tuple(self.names[index] for index in first)

    def distinct(self, rows: Sequence[int]) -> QuerySet:
        """Some of the distinct queries, by their rows of x0, once each."""
        names, ids = self.distinct_names, self.ids
        order = np.arange(len(rows), dtype=np.int64)
        return QuerySet(
            x0=self.x0[list(rows)],
            ids=tuple(ids[r] for r in rows),
            names=tuple(names[r] for r in rows),
            row=order,
            conditions=self.conditions[torch.tensor(rows)],
        )


@dataclass(frozen=True, eq=False)
class _Query:
    name: str
    content: np.ndarray[Any, Any]
    """What is hashed: uint8 pixels as decoded, or float32 values."""

    def values(self) -> Tensor:
        """[(C, H, W), float32]; pixels are mapped to [-1, 1]."""
        if self.content.dtype == np.float32:
            return torch.from_numpy(self.content)
        pixels = self.content[..., None] if self.content.ndim == 2 else self.content
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 * 2 - 1


def load_queries(
    queries: QuerySource,
    *,
    channels: int,
    size: int | tuple[int, int] | None = None,
    ids: Sequence[int] | None = None,
    conditions: ConditionSource | None = None,
) -> QuerySet:
    """Read queries and check them against what the model takes.

    queries: see ``QuerySource``; a folder is read recursively, in the order of its sorted relative paths, and
        pixels become pixel / 255 * 2 - 1, as RGB or grey by ``channels``.
    channels: of the model; images need 1 or 3 [>= 1]. size: height and width [or None for any].
    ids: ids to use instead of the hash of content and condition [N, 0..2^64-1].
    conditions: of the queries in their order; None for an unconditional model.

    Raises TypeError or ValueError naming the argument, or the file with what was expected and found: no image,
    another size, another number of channels, NaN, two contents with one id. FileNotFoundError for a missing path.
    """
    check_int("load_queries", "channels", channels, 1)
    found = _read(queries, channels)
    if not found:
        raise ValueError(f"load_queries: queries must hold at least one query, got none in {describe(queries)}")
    height_width = (size, size) if isinstance(size, int) else size
    for query in found:
        _check(query, channels, height_width or tuple(found[0].values().shape[1:]))
    given = load_conditions(conditions, len(found))
    return _without_duplicates(found, _checked_ids(ids, found, given), given)


def _read(queries: QuerySource, channels: int) -> list[_Query]:
    if isinstance(queries, Tensor):
        if queries.dtype not in (torch.float32, torch.uint8) or queries.layout != torch.strided:
            raise ValueError(f"load_queries: queries must be float32 or uint8, got {describe(queries)}")
        return _from_array(queries.detach().cpu().resolve_neg().numpy(), channels)
    if isinstance(queries, np.ndarray):
        return _from_array(queries, channels)
    if isinstance(queries, str | Path):
        return _from_folder(Path(queries), channels)
    if isinstance(queries, Sequence):
        return [_from_item(index, item, channels) for index, item in enumerate(queries)]
    raise TypeError(
        f"load_queries: queries must be a folder, a tensor, an array or a sequence, got {describe(queries)}"
    )


def _from_array(values: np.ndarray[Any, Any], channels: int) -> list[_Query]:
    dimensions = (4,) if values.dtype == np.float32 else (3, 4)
    if values.dtype not in (np.uint8, np.float32) or values.ndim not in dimensions:
        raise ValueError(
            "load_queries: queries must be float32 of shape (N, C, H, W) or uint8 of shape (N, H, W) or (N, H, W, C), "
            f"got {values.dtype} of shape {values.shape}"
        )
    if 0 in values.shape[1:]:
        raise ValueError(f"load_queries: queries must have pixels, got shape {values.shape}")
    if values.dtype == np.uint8 and values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]  # grey pixels have one form, so that they have one id
    # A copy: torch warns about read-only memory, and the caller may change theirs.
    return [_Query(str(index), value.copy(order="C")) for index, value in enumerate(values)]


def image_names(folder: Path) -> list[str]:
    """The images in a folder and below it, in the order in which they are queries, as relative paths.

    Raises FileNotFoundError where there is no such folder, ValueError for a name that cannot be printed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"load_queries: queries must be a folder of images, found no folder {folder}")
    files = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not _hidden(path.relative_to(folder))
    )
    for name in files:
        if not name.isprintable() or not _is_utf8(name):
            raise ValueError(f"{folder}: file names must be printable UTF-8, found {name!r}")
    return files


def _from_folder(folder: Path, channels: int) -> list[_Query]:
    return [_Query(name, read_pixels(folder / name, channels)) for name in image_names(folder)]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _from_item(index: int, item: object, channels: int) -> _Query:
    if isinstance(item, Image.Image):
        return _Query(str(index), _pixels(item, channels, f"load_queries: queries[{index}]"))
    if isinstance(item, str | Path):
        return _Query(str(item), read_pixels(Path(item), channels))
    raise TypeError(f"load_queries: queries[{index}] must be an image file or a PIL image, got {describe(item)}")


def read_pixels(path: Path, channels: int) -> np.ndarray[Any, Any]:
    """The pixels of an image file [(H, W) or (H, W, 3), uint8]. channels: 1 for grey, 3 for RGB.

    Raises ValueError naming the file and what it must be, FileNotFoundError where there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"load_queries: queries names {path}, found no such file")
    try:
        with Image.open(path) as image:
            image.load()
            loaded = image.copy()
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: must be an image, found a file that cannot be read as one") from error
    except PermissionError:
        raise
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # all that Pillow's decoders raise
        raise ValueError(f"{path}: must be a whole image, found a damaged file ({error})") from error
    return _pixels(loaded, channels, str(path))


def _pixels(image: Image.Image, channels: int, where: str) -> np.ndarray[Any, Any]:
    if channels not in _MODES:
        raise ValueError(f"{where}: a model of {channels} channels takes latents as a float32 tensor, got an image")
    if image.mode not in _CONVERTIBLE:
        raise ValueError(f"{where}: must be an 8-bit grey or RGB image, found mode {image.mode}")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise ValueError(f"{where}: must be an opaque image, found transparent pixels")
    return np.array(image.convert(_MODES[channels]))


def _check(query: _Query, channels: int, size: tuple[int, ...]) -> None:
    shape = tuple(query.values().shape)
    if shape != (channels, *size):
        raise ValueError(
            f"load_queries: query {query.name} must have {channels} x {size[0]} x {size[1]} channels, height and "
            f"width, found {' x '.join(map(str, shape))}"
        )
    if query.content.dtype == np.float32 and not np.isfinite(query.content).all():
        raise ValueError(f"load_queries: query {query.name} must be finite, found NaN or infinity")


def _checked_ids(ids: Sequence[int] | None, found: list[_Query], conditions: Conditions) -> list[int]:
    if ids is None:
        keys = (None,) if conditions.keys is None else conditions.keys
        return [query_id(query.content, keys[row]) for query, row in zip(found, conditions.row, strict=True)]
    if len(ids) != len(found):
        raise ValueError(f"load_queries: ids must hold one id a query ({len(found)}), got {len(ids)}")
    return [check_int("load_queries", "ids", value, 0, 2**64 - 1) for value in ids]


def _without_duplicates(found: list[_Query], ids: list[int], conditions: Conditions) -> QuerySet:
    first: dict[int, int] = {}
    distinct: list[int] = []
    for index, number in enumerate(ids):
        known = first.setdefault(number, len(distinct))
        if known == len(distinct):
            distinct.append(index)
            continue
        before = distinct[known]
        same = np.array_equal(found[before].content, found[index].content)
        if not same or conditions.row[before] != conditions.row[index]:
            raise ValueError(
                f"load_queries: ids must differ where {'conditions' if same else 'contents'} differ, got "
                f"{number:#018x} for both {found[before].name} and {found[index].name}"
            )
    return QuerySet(
        x0=torch.stack([found[index].values() for index in distinct]),
        ids=tuple(first),
        names=tuple(query.name for query in found),
        row=np.array([first[number] for number in ids], dtype=np.int64),
        conditions=conditions[torch.tensor(distinct)],
    )
