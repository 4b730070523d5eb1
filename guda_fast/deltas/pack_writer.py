"""Writing delta packs: a new one, and more groups for one that is there."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from guda_fast._validate import check_choice, check_real, describe
from guda_fast.deltas.bank import DeltaBank, ProgressCallback
from guda_fast.deltas.delta import HASH_BYTES, Dense, LowRank, Part, cast
from guda_fast.deltas.diff import extremes, wide
from guda_fast.deltas.groups import Group
from guda_fast.deltas.low_rank import TOLERANCE, factored
from guda_fast.deltas.pack import Pack, PackGroup
from guda_fast.deltas.pack_file import is_pack
from guda_fast.deltas.pack_folder import (
    add_to_index,
    check_length,
    header_bytes,
    locked,
    new_shard_path,
    publish,
)
from guda_fast.deltas.pack_format import (
    DTYPES,
    MAX_TOLERANCE,
    RANKS,
    STORED,
    Form,
    GroupHeader,
    IndexEntry,
    PackHeader,
    Rounding,
    SourceFile,
    tensor_keys,
)
from guda_fast.deltas.sources import SourceLike
from guda_fast.deltas.survey import survey
from guda_fast.errors import CheckpointError

_CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_COPIED_AT_ONCE = 1 << 24


def build_pack(
    base: str | os.PathLike[str] | torch.nn.Module,
    counterfactuals: Mapping[str, SourceLike],
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    rank: str = "off",
    tolerance: float = TOLERANCE,
    allow_identical: bool = False,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> Pack:
    """Write the deltas of all groups to one file, for ``DeltaBank.load(base, path)``.

    delta_k = theta_k - theta_0 is formed as ``DeltaBank.load`` does, and then rounded once to ``dtype``: from float32
    weights and with the defaults the pack gives the models that a ``DeltaBank`` of its sources forms, bit for bit. Of
    a pack as a source, what is known of its sources is kept, and rounding adds up. Each source is read once,
    one tensor at a time; beside the pack, until it is finished, its values need their space on the disk once more. The
    file appears under its name when it is whole.

    base, counterfactuals, allow_identical: as for ``DeltaBank.load``, counterfactuals as a mapping
    path: the file to write
    dtype: "float32"; "float16", which halves the file, and whose rounding ``Pack`` states; "stored", which loses
        nothing: the narrowest of float16, bfloat16, float32 and float64 that holds every value of a part
    rank: "off" stores factors only where the source has them; "auto" also finds them in dense differences
    tolerance: for "auto", what ||delta - up down|| / ||delta|| of a parameter may be before both factors are rounded
        to ``dtype`` [0 <= tolerance < 1]; 0 takes exact factors only
    force: replace a pack that is there already; other files, and packs that are among the sources, never are
    progress: called after each group with (groups done, groups in all)

    Returns: the pack, opened
    Raises: TypeError or ValueError for an argument of another type or value, or more groups than a header holds;
        FileExistsError for a path that may not be replaced; CheckpointError as ``DeltaBank.load`` and
        ``DeltaBank.survey``, and where float16 cannot hold a value or keeps nothing of a group

    >>> pack = build_pack("runs/full", {"cat": "runs/unlearn_cat"}, "bank.safetensors")  # doctest: +SKIP
    >>> pack.groups  # doctest: +SKIP
    ('cat',)
    """
    how = _Settings.checked("build_pack", dtype, rank, tolerance)
    target = Path(path).resolve()
    _check_replaceable(target, force)
    bank = DeltaBank.load(base, counterfactuals, allow_identical=allow_identical)
    for group in bank.groups:
        if target in (file.resolve() for file in bank.source(group).files):
            raise FileExistsError(f"build_pack: path must not be read for group {group!r} too, got {target}")
    origin = str(Path(base).absolute()) if isinstance(base, str | os.PathLike) else ""
    with _written(bank, origin, how, target.parent, progress) as shard, locked(target):
        # Again: it may have come while the sources were read.
        _check_replaceable(target, force)
        shard.write(target)
    return Pack.open(target)


def append_pack(
    path: str | os.PathLike[str],
    counterfactuals: Mapping[str, SourceLike],
    *,
    base: str | os.PathLike[str] | torch.nn.Module | None = None,
    dtype: str | None = None,
    rank: str | None = None,
    tolerance: float | None = None,
    allow_identical: bool = False,
    progress: ProgressCallback | None = None,
) -> Pack:
    """Add groups to a pack; what is in it is not written again.

    The groups go to a file of their own beside the pack, which becomes an index of its files. Until that moment the
    pack is what it was, also after a crash, and programs that have it open are not disturbed at any time.

    path: the pack
    counterfactuals: of the new groups, as for ``DeltaBank.load``, as a mapping
    base: as for ``DeltaBank.load``; None takes the folder that the pack was built from
    dtype, rank, tolerance: as for ``build_pack``; None takes what the pack's last file was written with
    allow_identical, progress: as for ``build_pack``

    Returns: the pack, opened again, with the new groups last
    Raises: as ``build_pack``; CheckpointError also when the pack cannot be read, belongs to another base, has a group
        of one of these names already, or was changed meanwhile

    >>> append_pack("bank.safetensors", {"dog": "runs/unlearn_dog"}).groups  # doctest: +SKIP
    ('cat', 'dog')
    """
    pack = Pack.open(path)
    given = zip((dtype, rank, tolerance), pack.settings[-1], strict=True)
    if not isinstance(counterfactuals, Mapping):
        raise TypeError(
            f"append_pack: counterfactuals must be a mapping of group names, got {describe(counterfactuals)}"
        )
    how = _Settings.checked("append_pack", *(last if value is None else value for value, last in given))
    if twice := [group for group in counterfactuals if group in pack.groups]:
        raise CheckpointError(f"{pack.path}: must not hold group {twice[0]!r} already")
    if base is None and not pack.base_origin:
        raise ValueError(f"append_pack: base must be given, because {pack.path} was built from a model in memory")
    bank = DeltaBank.load(pack.base_origin if base is None else base, counterfactuals, allow_identical=allow_identical)
    bank.check_owns(pack)
    with _written(bank, pack.base_origin, how, pack.path.parent, progress) as shard:
        added = shard.write(new_shard_path(pack.path))
    add_to_index(pack, added)
    return Pack.open(pack.path)


@dataclass(frozen=True)
class _Settings:
    where: str
    dtype: str
    rank: str
    tolerance: float

    @classmethod
    def checked(cls, where: str, dtype: Any, rank: Any, tolerance: Any) -> _Settings:
        check_choice(where, "dtype", dtype, DTYPES)
        check_choice(where, "rank", rank, RANKS)
        check_real(where, "tolerance", tolerance, 0.0, MAX_TOLERANCE)
        return cls(where, dtype, rank, float(tolerance))

    def stored(self, part: Part) -> tuple[Part, Form]:
        """The part as it is written, in the dtype that the file gets, and its form."""
        if self.rank == "auto" and isinstance(part, Dense):
            part = factored(part.value, self.tolerance) or part
        dtype = _narrowest(part) if self.dtype == "stored" else STORED[self.dtype]
        tensors = [cast(tensor, dtype).contiguous() for _, tensor in part.tensors()]
        if isinstance(part, LowRank):
            return LowRank(*tensors), Form(dtype, part.rank)
        return Dense(*tensors), Form(dtype)


class _Shard:
    """The rows of a file's groups, in the order in which they came, and its header."""

    def __init__(self, how: _Settings, spool: IO[bytes]) -> None:
        self._how = how
        self._spool = spool
        self._supports: dict[tuple[tuple[str, Form], ...], int] = {}
        self._groups: list[GroupHeader] = []
        self._rows: dict[str, list[int]] = {}
        self._row_shapes: dict[str, tuple[int, ...]] = {}
        self._header = b""
        self._hash = ""
        self._length = 0

    def add(self, name: str, bank: DeltaBank) -> None:
        """Read a group, and keep its rows as they will be in the file."""
        source, error = bank.source(name), _Error()
        forms: dict[str, Form] = {}
        checksums: list[int] = []

        def stored() -> Iterator[tuple[str, Part]]:
            for key, part in source.parts():
                written, form = self._how.stored(part)
                read = _as_read(written)
                error.add(part, read, bank.theta_0(key).shape)
                if not _changes(read):
                    continue
                _check_finite(read, f"{source.origin}: key {key!r}", self._how.dtype)
                forms[key] = form
                checksums.extend(self._keep(key, form, written))
                yield key, read
                del part, written, read  # the next one is formed in their memory

        found = survey(source.origin, stored(), bank.theta_0)
        if not forms and error.is_something:
            raise CheckpointError(f"{source.origin}: {self._how.dtype} keeps nothing of it; pass dtype='stored'")
        bank.check_different(name, found.support)
        support = self._supports.setdefault(tuple(forms.items()), len(self._supports))
        origin, files, rounding = _history(source, error.rounding())
        header = GroupHeader(
            name,
            support,
            origin,
            files,
            found.hash,
            found.relative_rms,
            found.cosine,
            rounding,
            tuple(checksums),
        )
        self._groups.append(header)
        # As text within text, of which the rest of the header is little: known before all sources have been read.
        self._length += len(json.dumps(json.dumps(header.to_json(), separators=(",", ":"))))
        check_length(self._how.where, self._length)

    def finish(self, bank: DeltaBank, base_origin: str) -> None:
        """Make the header, when all groups are there."""
        how, supports = self._how, tuple(dict(support) for support in self._supports)
        header = PackHeader(
            bank.weights_hash,
            base_origin,
            bank.config,
            how.dtype,
            how.rank,
            how.tolerance,
            supports,
            tuple(self._groups),
        )
        keys = sorted({key for support in supports for key in tensor_keys(support)})
        tensors, offset = {}, 0
        for key in keys:
            shape = (len(self._rows[key]), *self._row_shapes[key])
            dtype = key.rpartition(".")[2]
            end = offset + torch.Size(shape).numel() * STORED[dtype].itemsize
            tensors[key] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": (offset, end)}
            offset = end
        self._header, self._hash = header_bytes(how.where, header.to_json(), tensors)
        self._rows = {key: self._rows[key] for key in keys}

    def write(self, path: Path) -> IndexEntry:
        """Write the file: the header, and of each stack the rows of all groups."""
        publish(path, self._content())
        return IndexEntry(path.name, path.stat().st_size, self._hash)

    def _content(self) -> Iterator[bytes]:
        yield self._header
        for key, starts in self._rows.items():
            size = torch.Size(self._row_shapes[key]).numel() * STORED[key.rpartition(".")[2]].itemsize
            for start in starts:
                yield from self._row(start, size)

    def _keep(self, name: str, form: Form, part: Part) -> Iterator[int]:
        """Keep the rows of a part, and give their checksums."""
        for key, (_, tensor) in zip(form.keys(name), part.tensors(), strict=True):
            self._rows.setdefault(key, []).append(self._spool.tell())
            self._row_shapes[key] = tuple(tensor.shape)
            content = tensor.view(-1).view(torch.uint8).numpy().data
            self._spool.write(content)
            yield zlib.crc32(content)

    def _row(self, start: int, size: int) -> Iterator[bytes]:
        self._spool.seek(start)
        while size:
            piece = self._spool.read(min(size, _COPIED_AT_ONCE))
            yield piece
            size -= len(piece)


class _Error:
    """Sums over a group's values: squares of what was, of what is stored, of their difference, and their product."""

    def __init__(self) -> None:
        self._was = self._is = self._rest = self._product = 0.0

    def add(self, part: Part, read: Part, shape: torch.Size) -> None:
        was, is_ = (each.full(shape).flatten().double() for each in (part, read))
        self._was += float(was @ was)
        self._is += float(is_ @ is_)
        self._product += float(was @ is_)
        self._rest += float((was - is_).square().sum())

    @property
    def is_something(self) -> bool:
        """Whether anything was not zero."""
        return self._was > 0

    def rounding(self) -> Rounding:
        if self._rest == 0:
            return Rounding(1.0, 0.0)
        if not math.isfinite(self._rest) or 0 in (self._was, self._is):
            return Rounding(0.0, 1.0)
        cosine = self._product / math.sqrt(self._was * self._is)
        return Rounding(max(-1.0, min(1.0, cosine)), math.sqrt(self._rest / self._was))


@contextmanager
def _written(
    bank: DeltaBank, base_origin: str, how: _Settings, folder: Path, progress: ProgressCallback | None
) -> Iterator[_Shard]:
    """A file's rows and header, kept in a file without a name as long as the block lasts."""
    with tempfile.TemporaryFile(dir=folder) as spool, torch.no_grad():
        shard = _Shard(how, spool)
        for done, group in enumerate(bank.groups, 1):
            shard.add(group, bank)
            if progress is not None:
                progress(done, len(bank))
        shard.finish(bank, base_origin)
        yield shard


def _narrowest(part: Part) -> torch.dtype:
    """The narrowest dtype that holds every value of the part."""
    tensors = [tensor for _, tensor in part.tensors()]
    return next(
        dtype
        for dtype in STORED.values()
        if all(torch.equal(cast(cast(tensor, dtype), tensor.dtype), tensor) for tensor in tensors)
    )


def _as_read(part: Part) -> Part:
    """A stored part as the reader gives it."""
    tensors = [cast(tensor, wide(tensor.dtype)) for _, tensor in part.tensors()]
    return LowRank(*tensors) if isinstance(part, LowRank) else Dense(*tensors)


def _changes(part: Part) -> bool:
    return all(any(extremes(tensor)) for _, tensor in part.tensors())


def _check_finite(part: Part, where: str, dtype: str) -> None:
    """The part was finite before it was rounded."""
    for _, tensor in part.tensors():
        if not all(map(math.isfinite, extremes(tensor))):
            raise CheckpointError(f"{where} must hold values that {dtype} can hold; pass dtype='stored'")


def _history(source: Group | PackGroup, rounding: Rounding) -> tuple[str, tuple[SourceFile, ...], Rounding]:
    """Where a group came from, and what rounding has changed in it: in a pack, since before it was packed."""
    if isinstance(source, PackGroup):
        packed = source.packed
        return packed.origin, packed.sources, packed.rounding.then(rounding)
    return source.origin, tuple(_source_file(path) for path in source.files), rounding


def _check_replaceable(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not force:
        raise FileExistsError(
            f"build_pack: path must not exist, got {target}; pass force=True (--force) to replace it, or append to it"
        )
    if not is_pack(target):
        raise FileExistsError(f"build_pack: path must be free, or that of a delta pack, got {target}")


def _source_file(path: Path) -> SourceFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=HASH_BYTES))
    return SourceFile(str(path), path.stat().st_size, digest.hexdigest())
