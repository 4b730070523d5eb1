"""The log of a run: a JSON object a step, in memory and as lines of a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from guda_fast._files import atomic_write
from guda_fast.errors import CheckpointError

LOG = "log.jsonl"


class Log:
    """path: a file that gets a line a step [None: only in memory]."""

    def __init__(self, path: Path | None) -> None:
        self.lines: list[str] = []
        self._path = path

    def cut(self, step: int) -> None:
        """Go back to how the log was after ``step`` steps: what came later, or was cut off, is removed.

        Raises CheckpointError naming a damaged line before that, and leaves the file as it is.
        """
        if self._path is None or not self._path.exists():
            return
        kept: list[str] = []
        lines = [line for line in self._path.read_bytes().split(b"\n") if line.strip()]
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                at = record["step"]
                later = int(at) > step
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                # What is after the checkpoint's step, or was being written when the process was killed, is made again.
                if len(kept) == step or number == len(lines):
                    break
                raise CheckpointError(
                    f"{self._path}, line {number}: must be the JSON object of a step, found {line[:80]!r} "
                    f"({type(error).__name__}); remove the line to go on without it"
                ) from error
            if later:
                break
            kept.append(json.dumps(record))
        self.lines[:] = kept
        with atomic_write(self._path, "w") as file:
            file.write("".join(f"{line}\n" for line in kept))

    def add(self, record: Mapping[str, float | None]) -> None:
        """Add a step; what is not finite, as the norm of a gradient that overflowed, becomes null."""
        line = json.dumps({key: _finite(value) for key, value in record.items()})
        self.lines.append(line)
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8", newline="") as file:
                file.write(f"{line}\n")


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
