"""One file of a delta pack: its header, read and checked, and its rows, each read when it is asked for."""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from guda_fast.deltas.delta import Dense, LowRank, Part, cast
from guda_fast.deltas.diff import BaseTensor, KeyProblem, check_finite, wide
from guda_fast.deltas.pack_format import (
    LENGTH,
    MAGIC,
    MAX_HEADER,
    STORED,
    VERSION,
    Form,
    HeaderProblem,
    IndexEntry,
    PackHeader,
    Support,
    tensor_keys,
    text_hash,
)
from guda_fast.deltas.reading import read_tensor
from guda_fast.errors import CheckpointError

_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class Stack:
    """The tensors of all groups that have a part in one form: shape (groups, *tensor), from the byte ``start`` on."""

    dtype: str
    shape: tuple[int, ...]
    start: int


class PackFile:
    """A file that begins as packs do: its header, read and checked. It is open only while something is read from it.

    path: the file
    Raises: CheckpointError where it is no pack, damaged, or of another version
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor = _opened(path)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: must be a file, found something else")
            self.size = status.st_size
            self._stamp = _stamp(status)
            header = json.loads(self._header(descriptor))
        finally:
            os.close(descriptor)
        metadata = header.pop("__metadata__")
        self.hash, self.content = self._content(metadata)
        # The values begin where the header ends; what each takes was checked.
        self.stacks = {
            key: Stack(
                _DTYPES.get(about["dtype"], about["dtype"]),
                tuple(about["shape"]),
                self._values + about["data_offsets"][0],
            )
            for key, about in header.items()
        }

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor for ``row``: of the file whose header was read, also where an index has taken its name.

        Raises: CheckpointError where that file is gone or was changed
        """
        descriptor = self._same(self.path)
        if descriptor is None:
            descriptor = self._same(shard_path(self.path, self.hash))
        if descriptor is None:
            raise CheckpointError(f"{self.path}: is gone or has changed since it was opened; open the pack again")
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def row(self, descriptor: int, key: str, row: int) -> torch.Tensor:
        """One group's tensor of a stack, whose dtype torch has; no other byte of the values is read."""
        stack = self.stacks[key]
        shape, dtype = stack.shape[1:], STORED[stack.dtype]
        start = stack.start + row * _numel(shape) * dtype.itemsize
        return read_tensor(descriptor, self.path, key, start, shape, dtype)

    def _same(self, path: Path) -> int | None:
        """A descriptor of the file whose header was read, if it has this name."""
        if not path.exists():
            return None
        descriptor = _opened(path)
        if _stamp(os.fstat(descriptor)) == self._stamp:
            return descriptor
        os.close(descriptor)
        return None

    def _header(self, descriptor: int) -> bytes:
        length = int.from_bytes(os.pread(descriptor, LENGTH, 0), "little")
        if os.pread(descriptor, len(MAGIC), LENGTH) != MAGIC:
            raise CheckpointError(f"{self.path}: must be a delta pack of guda_fast, found another kind of file")
        if length > min(MAX_HEADER, self.size - LENGTH):
            most = f"at most {MAX_HEADER} bytes, in a file of {self.size}"
            raise CheckpointError(f"{self.path}: the header must have {most}, found {length}")
        self._values = LENGTH + length
        try:
            # Checks that tensors lie one behind the other, have the size of their shape, and fill the file.
            with safe_open(self.path, framework="pt", device="cpu"):
                return os.pread(descriptor, length, LENGTH)
        except (RuntimeError, OSError) as error:
            # RuntimeError: it opens the file again by itself, where no more can be open.
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from error
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: damaged or truncated delta pack: {error}") from error

    def _content(self, metadata: Mapping[str, str]) -> tuple[str, Mapping[str, Any]]:
        """The hash of the pack's own part of the header, and that part."""
        version, text = metadata.get("version"), metadata.get("pack", "")
        if version != VERSION:
            raise CheckpointError(
                f"{self.path}: key 'version' must be {VERSION!r}, found {version!r}: made by another guda_fast; "
                "build the pack again, or use the version that made it"
            )
        if text_hash(text) != metadata.get("hash"):
            raise CheckpointError(f"{self.path}: key 'pack' must have the hash that is written beside it: damaged")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: key 'pack' must be JSON: {error}") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.path}: key 'pack' must be an object, found {type(content).__name__}")
        return text_hash(text), content


@dataclass(frozen=True)
class Summary:
    """What the header tells of a group's parts.

    kinds: "dense" or "low-rank", by parameter
    ranks: of the low-rank parts
    values: in the tensors that change
    bytes: of the parts, once they are read
    """

    kinds: Mapping[str, str]
    ranks: Mapping[str, int]
    values: int
    bytes: int


class Shard:
    """The groups that one file holds.

    Raises: CheckpointError where the header contradicts the file's tensors
    """

    def __init__(self, file: PackFile) -> None:
        self._file = file
        self.path = file.path
        self._summaries: dict[int, Summary] = {}
        self.entry = IndexEntry(file.path.name, file.size, file.hash)
        try:
            self.header = PackHeader.from_json(file.content)
            self._stacked = [frozenset(tensor_keys(support)) for support in self.header.supports]
            self._check_stacks()
        except HeaderProblem as problem:
            raise CheckpointError(f"{file.path}: {problem}") from None

    def parts(self, position: int, only: Collection[str] | None = None) -> Iterator[tuple[str, Part]]:
        """The parts of a group in the order of their names, each read when its turn comes, contiguous, in float32 or
        float64.

        only: the names to read; None for all
        Raises: CheckpointError where bytes are not those that were written, or not finite
        """
        group, before = self.header.groups[position], Counter(g.support for g in self.header.groups[:position])
        checksums = iter(group.checksums)
        with self._file.opened() as descriptor:
            for name, form in self.header.supports[group.support].items():
                keys = form.keys(name)
                expected = [next(checksums) for _ in keys]
                if only is not None and name not in only:
                    continue
                tensors = []
                for key, checksum in zip(keys, expected, strict=True):
                    row = sum(count for support, count in before.items() if key in self._stacked[support])
                    stored = self._file.row(descriptor, key, row)
                    tensors.append(self._checked(group.name, key, stored, checksum))
                    del stored
                yield name, Dense(*tensors) if form.rank is None else LowRank(*tensors)
                del tensors  # the next one is read into its memory

    def summary(self, position: int) -> Summary:
        """What there is to say of a group without its values."""
        support = self.header.groups[position].support
        if support not in self._summaries:
            self._summaries[support] = self._summary(self.header.supports[support])
        return self._summaries[support]

    def check_fits(self, tensors: Mapping[str, BaseTensor]) -> None:
        """Check that every part belongs to a tensor of the base that has its shape.

        tensors: of the base, by first name
        Raises: CheckpointError that names the key
        """
        for support in self.header.supports:
            for name, form in support.items():
                if name not in tensors or not tensors[name].dtype.is_floating_point:
                    raise CheckpointError(f"{self.path}: key {name!r} must be a floating tensor of the base, it is not")
                for key, expected in zip(form.keys(name), _shapes(form, tensors[name].shape), strict=True):
                    found = self._file.stacks[key].shape[1:]
                    if found != expected:
                        raise CheckpointError(f"{self.path}: key {key!r} must hold {expected} a group, found {found}")

    def _summary(self, support: Support) -> Summary:
        values = size = 0
        for name, form in support.items():
            shapes = [self._file.stacks[key].shape[1:] for key in form.keys(name)]
            values += _numel(shapes[0]) if form.rank is None else shapes[0][0] * _numel(shapes[1][1:])
            size += wide(form.dtype).itemsize * sum(map(_numel, shapes))
        return Summary(
            {name: form.kind for name, form in support.items()},
            {name: form.rank for name, form in support.items() if form.rank is not None},
            values,
            size,
        )

    def _checked(self, group: str, key: str, stored: torch.Tensor, checksum: int) -> torch.Tensor:
        if zlib.crc32(_bytes(stored)) != checksum:
            raise CheckpointError(
                f"{self.path}: group {group!r}: key {key!r} must have the checksum that was written with it: damaged"
            )
        try:
            check_finite(stored)
        except KeyProblem as problem:
            raise CheckpointError(f"{self.path}: group {group!r}: key {key!r} {problem}") from None
        return cast(stored, wide(stored.dtype))

    def _check_stacks(self) -> None:
        stacks, users = self._file.stacks, Counter(group.support for group in self.header.groups)
        rows: Counter[str] = Counter()
        for position, support in enumerate(self.header.supports):
            for name, form in support.items():
                for key in form.keys(name):
                    rows[key] += users[position]
                    if key not in stacks:
                        raise HeaderProblem(f"key {key!r} is missing, 'supports[{position}]' lists it")
                    _check_form(key, form, stacks[key])
        for key, stack in stacks.items():
            if stack.shape[:1] != (rows[key],):
                found = f"shape {stack.shape}"
                raise HeaderProblem(f"key {key!r} must have a row for each of {rows[key]} groups, found {found}")


def is_pack(path: Path) -> bool:
    """Whether a path is a file that begins as packs do; CheckpointError where it cannot be read."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(LENGTH + len(MAGIC))[LENGTH:] == MAGIC
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def shard_path(pack: Path, hash_: str) -> Path:
    """The name that the first file of a pack gets when the pack's own goes to an index; hash_: of its header."""
    return pack.with_name(f"{pack.stem}.{hash_}.safetensors")


def _opened(path: Path) -> int:
    try:
        # A named pipe would otherwise wait for a writer.
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        # ValueError: no file can have this name.
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be opened: {reason}") from error


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_form(key: str, form: Form, stack: Stack) -> None:
    """Check what can be checked without the base."""
    if STORED.get(stack.dtype) != form.dtype:
        raise HeaderProblem(f"key {key!r} must have the dtype that its name says, found {stack.dtype}")
    if form.rank is None:
        return
    up = ":up." in key
    if len(stack.shape) < 3 or (up and len(stack.shape) != 3) or stack.shape[2 if up else 1] != form.rank:
        wanted = f"(groups, O, {form.rank})" if up else f"(groups, {form.rank}, *I)"
        raise HeaderProblem(f"key {key!r} must have shape {wanted}, found {stack.shape}")


def _shapes(form: Form, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of a group's tensors, in the order of ``Form.keys``, for a parameter of the base."""
    return [shape] if form.rank is None else [(*shape[:1], form.rank), (form.rank, *shape[1:])]


def _bytes(tensor: torch.Tensor) -> memoryview:
    # Flattened, because a tensor without dimensions cannot be viewed as bytes.
    return tensor.view(-1).view(torch.uint8).numpy().data


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
