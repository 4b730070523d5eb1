"""Arrays of an ``.npz`` file of unknown origin: what a header claims is compared before anything is read."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from guda_fast.errors import CheckpointError

# What zipfile, zlib and numpy raise for damaged, encrypted and unknown content.
_DAMAGE = (OSError, ValueError, EOFError, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile)
# Others, such as LZMA, may ask for gigabytes before the first byte; numpy writes these two.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_HEADERS: dict[tuple[int, int], Callable[[IO[bytes]], Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    by_column: bool
    dtype: np.dtype[Any]


class NpzFile:
    """An open ``.npz`` file, to be closed as a context manager.

    Raises CheckpointError naming the file and the key; OSError where it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("rb")
        try:
            self._zip = zipfile.ZipFile(self._stream)
        except _DAMAGE as error:
            self._stream.close()
            raise CheckpointError(f"{path}: must be a whole .npz file, found a damaged one ({error})") from error
        self.keys = [name.removesuffix(".npy") for name in self._zip.namelist()]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()
        self._stream.close()

    def kind(self, key: str) -> str:
        """The kind of an array's dtype, from its header alone: "O" for a pickle."""
        with self._member(key) as member:
            return _header(member).dtype.kind

    def array(self, key: str, kinds: str, shape: Sequence[int], *, longest: int = 0) -> np.ndarray[Any, Any]:
        """Read an array whose header claims what is expected; no more is read than that comes to.

        kinds: of dtype that it may have. shape: that it must have. longest: characters of a text at most.
        """
        with self._member(key) as member:
            found = _header(member)
            wide = found.dtype.kind == "U" and found.dtype.itemsize > 4 * longest
            if found.dtype.kind not in kinds or found.shape != tuple(shape) or wide:
                limit = f" of {longest} characters at most" if wide else ""
                raise CheckpointError(
                    f"{self.path}: key {key!r} must have shape {tuple(shape)} and kind {' or '.join(kinds)}{limit}, "
                    f"found {found.dtype} of shape {found.shape}"
                )
            size = int(np.prod(shape, dtype=np.int64)) * found.dtype.itemsize
            content = member.read(size)
            # The checksum is compared at the end of the member.
            if len(content) != size or member.read(1):
                raise ValueError(f"other than the {size} bytes of its header")
        array = np.frombuffer(content, found.dtype)
        return array.reshape(shape, order="F" if found.by_column else "C")

    @contextmanager
    def _member(self, key: str) -> Iterator[IO[bytes]]:
        """A member of the archive, open; what is raised while it is read names it."""
        if key not in self.keys:
            raise CheckpointError(f"{self.path}: key {key!r} must be there, found {', '.join(self.keys) or 'none'}")
        try:
            info = self._zip.getinfo(f"{key}.npy")
            if info.compress_type not in _COMPRESSIONS:
                raise ValueError(f"compression {info.compress_type}")
            with self._zip.open(info) as member:
                yield member
        except _DAMAGE as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path}: key {key!r} must be a whole array, found {error}") from error


def _header(member: IO[bytes]) -> _Header:
    version = np.lib.format.read_magic(member)
    if version not in _HEADERS:
        raise ValueError(f"version {version}")
    return _Header(*_HEADERS[version](member))
