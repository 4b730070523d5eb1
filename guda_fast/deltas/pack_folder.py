"""The files of a delta pack in their folder: how one is published, named by an index, and kept from other writers."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guda_fast._files import atomic_write
from guda_fast.deltas.pack import Pack
from guda_fast.deltas.pack_file import shard_path
from guda_fast.deltas.pack_format import LENGTH, MAX_HEADER, VERSION, IndexEntry, index_json, text_hash
from guda_fast.errors import CheckpointError

_ALIGNMENT = 64
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def publish(path: Path, content: Iterable[bytes]) -> None:
    """Write a file of a pack, or its index, which takes its name when it is whole and was opened as a pack."""
    with atomic_write(path, "wb") as file:
        for piece in content:
            file.write(piece)
        file.flush()
        Pack.open(file.name)


def new_shard_path(pack: Path) -> Path:
    """A name beside the pack that no file has or had."""
    return pack.with_name(f"{pack.stem}.{secrets.token_hex(16)}.safetensors")


def add_to_index(pack: Pack, added: IndexEntry) -> None:
    """Make the pack's file an index of its files and a new one, if the pack is still what was opened.

    Raises: CheckpointError where it is not, or where both do not make a pack; the new file is gone then
    """
    try:
        with locked(pack.path):
            if Pack.open(pack.path).hash != pack.hash:
                raise CheckpointError(f"{pack.path}: was changed while groups were added to it; add them again")
            entries = pack.entries
            if pack.path in pack.files:
                (first,) = entries
                named = shard_path(pack.path, first.hash)
                _also_named(pack.path, named)
                entries = (IndexEntry(named.name, first.bytes, first.hash),)
            header, _ = header_bytes("append_pack", index_json((*entries, added)), {})
            publish(pack.path, [header])
    except CheckpointError:
        # Its name was made for it, and the index does not have it: what goes wrong after the rename is an OSError.
        (pack.path.parent / added.file).unlink()
        raise


@contextmanager
def locked(pack: Path) -> Iterator[None]:
    """Keep other writers from a pack; the lock ends with the process.

    A file is locked and not the folder, which network file systems refuse. Where they refuse files too, there is no
    lock. The file is removed at the end, so that who waited for it looks whether it still is the one to lock.
    """
    path = pack.with_name(f".{pack.name}.lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            _lock(descriptor)
            if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def header_bytes(where: str, text: str, tensors: Mapping[str, Any]) -> tuple[bytes, str]:
    """A safetensors header with a pack's text, its length before it, and the text's hash."""
    hash_ = text_hash(text)
    # In this order: a pack is recognised by how it begins.
    metadata = {"format": "guda_fast.pack", "version": VERSION, "hash": hash_, "pack": text}
    header = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
    header += b" " * (-(LENGTH + len(header)) % _ALIGNMENT)
    check_length(where, len(header))
    return len(header).to_bytes(LENGTH, "little") + header, hash_


def check_length(where: str, length: int) -> None:
    """Raise ValueError for a header that is too long to be read again."""
    if length > MAX_HEADER:
        raise ValueError(
            f"{where}: the header must have at most {MAX_HEADER} bytes, got {length}: "
            "take fewer groups at once, and append the others"
        )


def _also_named(path: Path, name: Path) -> None:
    """Give a file a second name, in place of what an append that was interrupted may have left there."""
    if name.exists() and name.samefile(path):
        return
    temporary = name.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        os.link(path, temporary)
    except OSError:
        # A file system without links; where nothing can be written, this says so.
        with path.open("rb") as source, atomic_write(name, "wb") as target:
            shutil.copyfileobj(source, target)
        return
    try:
        os.replace(temporary, name)
    except BaseException:
        temporary.unlink()
        raise


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
