"""Rows of shares, with their Clopper-Pearson bounds, and the files that hold them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy import stats

from benchmarks.provenance import provenance
from guda_fast._files import atomic_write

Row = Mapping[str, object]
SHARED = ("device", "guda_fast", "commit", "date", "command")


def share(hits: int, count: int) -> dict[str, str]:
    """hits of count as columns: the share, and the ends of its 95 % Clopper-Pearson interval."""
    low = stats.beta.ppf(0.025, hits, count - hits + 1) if hits else 0.0
    high = stats.beta.ppf(0.975, hits + 1, count - hits) if hits < count else 1.0
    return {"share": f"{hits / count:.5f}", "low": f"{low:.5f}", "high": f"{high:.5f}"}


def write(path: Path, columns: Sequence[str], rows: Sequence[Row], command: str) -> None:
    """Write rows with the columns that all share; rows of other cases stay in a file that is there."""
    made = provenance("cpu")
    shared = {name: made[name] for name in SHARED[:-1]} | {"command": command}
    cases = {row["case"] for row in rows}
    kept = [row for row in read(path) if row["case"] not in cases] if path.exists() else []
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, [*columns, *SHARED], lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *({**row, **shared} for row in rows)])


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
