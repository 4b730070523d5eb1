"""What a committed CSV must hold to be believed."""

from __future__ import annotations

from pathlib import Path

from benchmarks.runner import COLUMNS, read_csv

PROVENANCE = ("device", "python", "torch", "guda_fast", "commit", "date", "command")
# Figures are printed with four digits, and older ones with fewer.
ROUNDING = 0.01


def problems(path: Path) -> list[str]:
    """Everything wrong with a CSV, as sentences; empty where it may be committed."""
    if not path.is_file():
        return ["there is no such file"]
    rows = read_csv(path)
    if not rows:
        return ["it has no rows"]
    if list(rows[0]) != COLUMNS:
        missing = sorted(set(COLUMNS) - set(rows[0]))
        return [f"columns must be those of the runner, got {list(rows[0])}; missing: {missing}"]
    return [f"row {number}: {problem}" for number, row in enumerate(rows, 2) for problem in _row_problems(row)]


def _row_problems(row: dict[str, str]) -> list[str]:
    found = [f"{column} is empty" for column in PROVENANCE if not row[column]]
    if "--quick" in row["command"]:
        found.append("--quick does not measure")
    try:
        median, low, high, rival, ratio, rate = (
            float(row[column]) for column in ("median_ms", "p20_ms", "p80_ms", "rival_median_ms", "ratio", "gb_per_s")
        )
    except ValueError as error:
        return [*found, f"a figure is no number: {error}"]
    if not 0 < low <= median <= high:
        found.append(f"percentiles must rise from above 0, got {low}, {median}, {high}")
    elif abs(ratio * median / rival - 1) > ROUNDING:
        found.append(f"ratio must be rival_median_ms / median_ms = {rival / median:.3f}, got {ratio}")
    elif abs(rate - (moved := int(row["bytes"]) / median / 1e6)) > ROUNDING * moved:
        found.append(f"gb_per_s must be bytes / median_ms = {moved:.3f}, got {rate}")
    return found
