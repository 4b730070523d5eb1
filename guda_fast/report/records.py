"""What a result cost and what it depends on, as tables of names and values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from guda_fast.results import Attribution

Rows = list[tuple[str, str]]

_COST = ("forwards", "seconds", "device", "threads", "batch_size", "plan", "choices")
_LEFT_OUT = ("config", "command")  # paths of the machine that scored
_SHOWN = 8


def cost_table(result: Attribution) -> Rows:
    """Forwards, seconds where they were recorded, and how forwards were executed."""
    record = result.provenance
    rows: Rows = []
    forwards = record.get("forwards")
    if isinstance(forwards, Mapping) and isinstance(forwards.get("used"), int):
        used, full = forwards["used"], forwards.get("full")
        share = (
            f" ({100 * used / full:.3g} % of {full:,} for all draws of all cells)"
            if isinstance(full, int) and full
            else ""
        )
        rows.append(("forwards", f"{used:,}{share}"))
    else:
        rows.append(("forwards", "not recorded"))
    if isinstance(record.get("seconds"), int | float | dict):
        rows += _rows("seconds", record["seconds"])
    else:
        rows.append(("seconds", "not recorded"))
    drawn = int(result.draws.sum())
    rows.append(("draws behind all cells", f"{drawn:,}" if drawn else "not known"))
    for key in _COST[2:]:
        if record.get(key) is not None:
            rows += _rows(key, record[key])
    return rows


def provenance_table(result: Attribution, sources: Mapping[str, str]) -> Rows:
    """What the scores depend on: hashes, protocol, precision and its audit, versions.

    sources: names and hashes of the files that were read. The command's options are left out: they hold paths.
    """
    rows: Rows = [(name, value) for name, value in sources.items()]
    rows.append(("standard errors", result.std_error_kind))
    for key, value in result.provenance.items():
        if key not in _COST and key not in _LEFT_OUT:
            rows += _rows(key, value)
    return rows


def _rows(name: str, value: Any) -> Rows:
    if isinstance(value, Mapping):
        return [row for key, inner in value.items() for row in _rows(f"{name}: {key}", inner)] or [(name, "none")]
    return [(name, _text(value))]


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        shown = [_text(entry) for entry in value]
        if len(shown) > 2 * _SHOWN:
            return f"{', '.join(shown[:_SHOWN])}, …, {shown[-1]} ({len(shown)} values)"
        return ", ".join(shown) or "none"
    return json.dumps(value)
