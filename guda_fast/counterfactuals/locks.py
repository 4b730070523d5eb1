"""Claims on work that several processes share; a claim ends with the process that has it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self


class Claim:
    """What ``claim`` gives; a context manager that releases it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    def release(self) -> None:
        """Let others have it. The file goes first, so that who opened it meanwhile finds that it is another."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def claim(path: Path) -> Claim | None:
    """The claim to what ``path`` stands for, or None while another process (or another call) has it.

    path: of a lock file, which is made, with its folder, and removed by ``release``; what a killed process leaves is
        taken over

    Raises OSError where files cannot be locked, as on some network file systems.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "cat.lock"
    >>> with claim(path):
    ...     print(claim(path))
    None
    >>> path.exists()
    False
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:  # its folder was removed, as empty, since the line before
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between the two calls its last holder may have removed it, and somebody else made it anew.
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return Claim(path, descriptor)
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
