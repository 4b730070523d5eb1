"""What happens in a run, as events: for the log, the bar and the metrics."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self


class Event(NamedTuple):
    """Something that a worker tells.

    kind: "ready" (it has its models), "begun", "step" (cells: of the shard so far, which may be a fraction), "done",
        "dropped" (another process was first), "waiting" (for shards that others have; cells: of those), "died" or
        "failed" (text: why). worker: the process. shard: its name.
    seconds: that the shard took.
    """

    kind: str
    worker: str
    shard: str = ""
    cells: float = 0.0
    seconds: float = 0.0
    text: str = ""


Report = Callable[[Event], object]

_LOGGED = ("ready", "begun", "done", "dropped", "died", "failed")


class Log:
    """A file of JSON lines, one an event, each with its time in UTC; a line is written at once and whole.

    path: is appended to; its folder must exist [None: nothing is written].
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def event(self, event: Event) -> None:
        """Write what a worker told, but for steps."""
        if event.kind in _LOGGED:
            told = {key: value for key, value in event._asdict().items() if key != "kind" and value}
            self.write(event.kind, **told)

    def write(self, kind: str, **entries: Any) -> None:
        """Write an event with JSON values."""
        if self._file is not None:
            line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind, **entries}
            os.write(self._file, (json.dumps(line) + "\n").encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.close(self._file)
