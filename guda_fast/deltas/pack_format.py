"""What a delta pack's header says: groups, how their parts are stored, what was found when they were written."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from guda_fast.deltas.delta import HASH_BYTES

VERSION = "1"
LENGTH = 8
"""Bytes that hold the length of the header."""
MAGIC = b'{"__metadata__":{"format":"guda_fast.pack",'
"""The first bytes after the header's length."""
MAX_HEADER = 8 * 2**20
MAX_TOLERANCE = math.nextafter(1.0, 0.0)
DTYPES = ("float32", "float16", "stored")
RANKS = ("off", "auto")
COSINES = ("float16", "bfloat16", "tf32")
STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_FORM = re.compile(r"(?P<kind>dense|low-rank\.(?P<rank>[1-9]\d{0,8}))\.(?P<dtype>float16|bfloat16|float32|float64)")
_HASH = re.compile(rf"[0-9a-f]{{{2 * HASH_BYTES}}}")
_CHECKSUM_DIGITS = 8


class HeaderProblem(Exception):
    """What is wrong with a header; the reader adds the file."""


@dataclass(frozen=True)
class Form:
    """How the part of one parameter is stored.

    dtype: of its tensors in the file
    rank: of its factors; None for a dense difference
    """

    dtype: torch.dtype
    rank: int | None = None

    @property
    def kind(self) -> str:
        """The kind of the part, as in ``Survey.support``."""
        return "dense" if self.rank is None else "low-rank"

    def keys(self, name: str) -> tuple[str, ...]:
        """What the file calls the stacks that hold the part of a parameter."""
        dtype = _dtype_name(self.dtype)
        if self.rank is None:
            return (f"{name}:dense.{dtype}",)
        return f"{name}:up.{self.rank}.{dtype}", f"{name}:down.{self.rank}.{dtype}"

    def __str__(self) -> str:
        kind = "dense" if self.rank is None else f"low-rank.{self.rank}"
        return f"{kind}.{_dtype_name(self.dtype)}"


Support = Mapping[str, Form]
"""How the parts of a group are stored, by parameter, in the order of the names."""


@dataclass(frozen=True)
class SourceFile:
    """A file that a group's counterfactual was read from: its path, its size in bytes, BLAKE2b of its content."""

    path: str
    bytes: int
    hash: str


@dataclass(frozen=True)
class Rounding:
    """What storing changed in a group's delta, over the parameters that changed.

    cosine: between the delta as stored and as it was [-1..1]; of a delta that was rounded several times, at least this
    relative_error: ||stored - delta|| / ||delta|| [>= 0]; of a delta that was rounded several times, at most this
    """

    cosine: float
    relative_error: float

    def then(self, after: Rounding) -> Rounding:
        """What both leave, one after the other: errors add, and so do angles."""
        if 0 in (self.relative_error, after.relative_error):
            return after if self.relative_error == 0 else self
        angle = min(math.pi, math.acos(self.cosine) + math.acos(after.cosine))
        return Rounding(
            math.cos(angle), self.relative_error + after.relative_error + self.relative_error * after.relative_error
        )


@dataclass(frozen=True)
class GroupHeader:
    """What a header says of one group.

    name: of the group
    support: the position of its support in the header's list
    origin: the path or description of the counterfactual that it was made from
    sources: its files, none for an object in memory
    hash: of the stored delta, as ``Delta.hash``
    relative_rms, cosine: of the stored delta, as in ``Survey``
    rounding: what storing changed
    checksums: CRC-32 of each stored tensor, in the order of the support and of ``Form.keys``
    """

    name: str
    support: int
    origin: str
    sources: tuple[SourceFile, ...]
    hash: str
    relative_rms: float
    cosine: Mapping[str, float]
    rounding: Rounding
    checksums: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The group's header, of JSON's types."""
        rms = self.relative_rms
        return {
            "name": self.name,
            "support": self.support,
            "origin": self.origin,
            "sources": [{"path": file.path, "bytes": file.bytes, "hash": file.hash} for file in self.sources],
            "hash": self.hash,
            # JSON has no infinity.
            "relative_rms": rms if math.isfinite(rms) else None,
            "cosine": dict(self.cosine),
            "rounding": {"cosine": self.rounding.cosine, "relative_error": self.rounding.relative_error},
            "checksums": "".join(f"{checksum:08x}" for checksum in self.checksums),
        }


@dataclass(frozen=True)
class PackHeader:
    """What one file of a pack says of itself.

    base_hash: of the base's tensors
    base_origin: the path of the base, empty for an object in memory
    base_config: its configuration, None where it has none
    dtype, rank, tolerance: what the writer was asked for
    supports: the distinct supports of the groups
    groups: in their order
    """

    base_hash: str
    base_origin: str
    base_config: Mapping[str, Any] | None
    dtype: str
    rank: str
    tolerance: float
    supports: tuple[Support, ...]
    groups: tuple[GroupHeader, ...]

    def to_json(self) -> str:
        """The header as text."""
        return json.dumps(
            {
                "base": {"hash": self.base_hash, "origin": self.base_origin, "config": self.base_config},
                "dtype": self.dtype,
                "rank": self.rank,
                "tolerance": self.tolerance,
                "supports": [{name: str(form) for name, form in support.items()} for support in self.supports],
                "groups": [group.to_json() for group in self.groups],
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PackHeader:
        """The header in an object that was read.

        Raises: HeaderProblem where it is not as ``to_json`` writes it
        """
        base = _mapping(content, "base")
        supports = tuple(_support(found, f"supports[{i}]") for i, found in enumerate(_list(content, "supports")))
        tensors = [sum(1 for _ in tensor_keys(support)) for support in supports]
        groups = tuple(_group(found, f"groups[{i}]", tensors) for i, found in enumerate(_list(content, "groups")))
        if not groups:
            raise HeaderProblem("key 'groups' must name a group, found none")
        ((name, count),) = Counter(group.name for group in groups).most_common(1)
        if count > 1:
            raise HeaderProblem(f"key 'groups' must name each group once, found {name!r} {count} times")
        return cls(
            _hash(base, "hash", "base"),
            _text(base, "origin", "base"),
            None if base.get("config") is None else _mapping(base, "config", "base"),
            _one_of(content, "dtype", DTYPES),
            _one_of(content, "rank", RANKS),
            _real(content, "tolerance", 0.0, MAX_TOLERANCE),
            supports,
            groups,
        )


@dataclass(frozen=True)
class IndexEntry:
    """One file of a pack of several.

    file: its name, in the folder of the index
    bytes: its size
    hash: of its header's text
    """

    file: str
    bytes: int
    hash: str


def index_json(entries: Sequence[IndexEntry]) -> str:
    """The text of an index."""
    files = [{"file": entry.file, "bytes": entry.bytes, "hash": entry.hash} for entry in entries]
    return json.dumps({"files": files}, separators=(",", ":"))


def index_entries(content: Mapping[str, Any]) -> tuple[IndexEntry, ...]:
    """The files that an index names.

    Raises: HeaderProblem where one is not a plain file name, or named twice
    """
    entries = []
    for i, found in enumerate(_list(content, "files")):
        where = f"files[{i}]"
        item = _object(found, where)
        name = _text(item, "file", where)
        if name != re.sub(r"[/\\\0]", "", name) or name in ("", ".", ".."):
            raise HeaderProblem(f"key '{where}.file' must be the name of a file in the index's folder, found {name!r}")
        entries.append(IndexEntry(name, _count(item, "bytes", where), _hash(item, "hash", where)))
    if len({entry.file for entry in entries}) < len(entries):
        raise HeaderProblem("key 'files' must name each file once")
    return tuple(entries)


def text_hash(text: str) -> str:
    """BLAKE2b of a header's text."""
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).hexdigest()


def tensor_keys(support: Support) -> Iterator[str]:
    """The stacks that hold a group of this support, in the order of its checksums."""
    for name, form in support.items():
        yield from form.keys(name)


def _group(found: object, where: str, tensors: Sequence[int]) -> GroupHeader:
    """A group's header; tensors gives how many each support has."""
    item = _object(found, where)
    support, name = _count(item, "support", where), _text(item, "name", where)
    if support >= len(tensors):
        raise HeaderProblem(f"key '{where}.support' must be below {len(tensors)}, found {support}")
    if not name:
        raise HeaderProblem(f"key '{where}.name' must not be empty")
    cosine, rounding = _mapping(item, "cosine", where), _mapping(item, "rounding", where)
    infinite = item.get("relative_rms", 0) is None
    return GroupHeader(
        name,
        support,
        _text(item, "origin", where),
        tuple(_source(source, f"{where}.sources") for source in _list(item, "sources", where)),
        _hash(item, "hash", where),
        math.inf if infinite else _real(item, "relative_rms", 0.0, math.inf, where),
        {key: _real(cosine, key, -1.0, 1.0, f"{where}.cosine") for key in COSINES},
        Rounding(
            _real(rounding, "cosine", -1.0, 1.0, f"{where}.rounding"),
            _real(rounding, "relative_error", 0.0, math.inf, f"{where}.rounding"),
        ),
        _checksums(_text(item, "checksums", where), tensors[support], where),
    )


def _support(found: object, where: str) -> Support:
    forms = {}
    for name, text in sorted(_object(found, where).items()):
        match = _FORM.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise HeaderProblem(f"key '{where}.{name}' must be dense.DTYPE or low-rank.R.DTYPE, found {_short(text)}")
        forms[name] = Form(STORED[match["dtype"]], None if match["rank"] is None else int(match["rank"]))
    return forms


def _source(found: object, where: str) -> SourceFile:
    item = _object(found, where)
    return SourceFile(_text(item, "path", where), _count(item, "bytes", where), _hash(item, "hash", where))


def _checksums(text: str, count: int, where: str) -> tuple[int, ...]:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(text) != count * _CHECKSUM_DIGITS or len(found) * 2 != len(text):
        wanted = f"{_CHECKSUM_DIGITS} hexadecimal digits for each of {count} tensors"
        raise HeaderProblem(f"key '{where}.checksums' must be {wanted}, found {_short(text)}")
    return struct.unpack(f">{count}I", found)


def _object(found: object, where: str) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise HeaderProblem(f"key '{where}' must be an object, found {_short(found)}")
    return found


def _mapping(item: Mapping[str, Any], key: str, where: str = "") -> Mapping[str, Any]:
    return _object(item.get(key), _path(where, key))


def _list(item: Mapping[str, Any], key: str, where: str = "") -> list[object]:
    found = item.get(key)
    if not isinstance(found, list):
        raise HeaderProblem(f"key '{_path(where, key)}' must be a list, found {_short(found)}")
    return found


def _text(item: Mapping[str, Any], key: str, where: str = "") -> str:
    found = item.get(key)
    if not isinstance(found, str):
        raise HeaderProblem(f"key '{_path(where, key)}' must be text, found {_short(found)}")
    return found


def _one_of(item: Mapping[str, Any], key: str, choices: Sequence[str]) -> str:
    found = _text(item, key)
    if found not in choices:
        raise HeaderProblem(f"key '{key}' must be one of {', '.join(map(repr, choices))}, found {_short(found)}")
    return found


def _hash(item: Mapping[str, Any], key: str, where: str = "") -> str:
    found = _text(item, key, where)
    if not _HASH.fullmatch(found):
        raise HeaderProblem(
            f"key '{_path(where, key)}' must be {2 * HASH_BYTES} hexadecimal digits, found {_short(found)}"
        )
    return found


def _count(item: Mapping[str, Any], key: str, where: str = "") -> int:
    found = item.get(key)
    if type(found) is not int or not 0 <= found < 2**63:
        raise HeaderProblem(f"key '{_path(where, key)}' must be a count, found {_short(found)}")
    return found


def _real(item: Mapping[str, Any], key: str, low: float, high: float, where: str = "") -> float:
    found = item.get(key)
    if (
        not isinstance(found, int | float)
        or isinstance(found, bool)
        or not (low <= found <= high and abs(found) <= sys.float_info.max)
    ):
        raise HeaderProblem(f"key '{_path(where, key)}' must be in [{low:g}, {high:g}], found {_short(found)}")
    return float(found)


def _path(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _short(found: object) -> str:
    text = repr(found)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
