"""What a committed CSV must hold to be believed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.runner import COLUMNS, read_csv

CONTENDER = ("backend", "instruction_set", "threads")
PROVENANCE = ("device", "python", "torch", "guda_fast", "commit", "date", "command")
# Figures are printed with four digits, and older ones with fewer.
ROUNDING = 0.01


def problems(path: Path) -> list[str]:
    """Everything wrong with a CSV, as sentences; empty where it may be committed."""
    if not path.is_file():
        return ["there is no such file"]
    try:
        rows = read_csv(path)
    except UnicodeDecodeError as error:
        return [f"it must be UTF-8, got {error}"]
    if not rows:
        return ["it has no rows"]
    if list(rows[0]) != COLUMNS:
        missing = sorted(set(COLUMNS) - set(rows[0]))
        return [f"columns must be those of the runner, got {list(rows[0])}; missing: {missing}"]
    cut = [f"row {number}: it is cut short" for number, row in enumerate(rows, 2) if None in row.values()]
    if cut:
        return cut
    medians: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        medians.setdefault(_case(row), []).append(row["median_ms"])
    found = [
        f"row {number}: {problem}"
        for number, row in enumerate(rows, 2)
        for problem in _row_problems(row, medians[_case(row)])
    ]
    seen = Counter((*_case(row), *(row[column] for column in CONTENDER)) for row in rows)
    return found + [f"{count} rows are of one contender: {' '.join(key)}" for key, count in seen.items() if count > 1]


def _case(row: dict[str, str]) -> tuple[str, ...]:
    return row["op"], row["shapes"], row["dtype"]


def _row_problems(row: dict[str, str], medians: Sequence[str]) -> list[str]:
    found = [f"{column} is empty" for column in PROVENANCE if not row[column]]
    if "--quick" in row["command"]:
        found.append("--quick does not measure")
    if row["rival_median_ms"] not in medians:
        found.append(f"rival_median_ms must be the median_ms of a row of this case, got {row['rival_median_ms']}")
    try:
        median, low, high, rival, ratio, rate, moved = (
            float(row[column])
            for column in ("median_ms", "p20_ms", "p80_ms", "rival_median_ms", "ratio", "gb_per_s", "bytes")
        )
    except ValueError as error:
        return [*found, f"a figure is no number: {error}"]
    if not all(math.isfinite(figure) for figure in (high, rival, ratio, rate, moved)):
        found.append("a figure is not finite")
    elif not 0 < low <= median <= high or rival <= 0:
        found.append(f"percentiles must rise from above 0, got {low}, {median}, {high}, and the rival's {rival}")
    elif abs(ratio * median / rival - 1) > ROUNDING:
        found.append(f"ratio must be rival_median_ms / median_ms = {rival / median:.3f}, got {ratio}")
    elif abs(rate - (reached := moved / median / 1e6)) > ROUNDING * reached:
        found.append(f"gb_per_s must be bytes / median_ms = {reached:.3f}, got {rate}")
    return found
