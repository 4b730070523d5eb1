"""The log of a run: a JSON object a step, in memory and as lines of a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from guda_fast._files import atomic_write
from guda_fast._json import read_lines

LOG = "log.jsonl"


class Log:
    """path: a file that gets a line a step [None: only in memory]."""

    def __init__(self, path: Path | None) -> None:
        self.lines: list[str] = []
        self._path = path

    def cut(self, step: int) -> None:
        """Go back to how the log was after ``step`` steps: what came later, or was cut off, is removed."""
        if self._path is None or not self._path.exists():
            return
        self.lines.clear()
        try:
            for _, record in read_lines(self._path):
                if int(record.get("step", step + 1)) <= step:
                    self.lines.append(json.dumps(record))
        except ValueError:  # the line at which the process was killed: all others are whole
            pass
        with atomic_write(self._path, "w") as file:
            file.write("".join(f"{line}\n" for line in self.lines))

    def add(self, record: Mapping[str, float | None]) -> None:
        """Add a step; what is not finite, as the norm of a gradient that overflowed, becomes null."""
        line = json.dumps({key: _finite(value) for key, value in record.items()})
        self.lines.append(line)
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8", newline="") as file:
                file.write(f"{line}\n")


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
