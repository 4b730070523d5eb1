"""Draws a benchmark's rows as an SVG: speed against the rival on the left, achieved bandwidth on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, str]
COLOURS = ("#7f7f7f", "#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377")


def draw(name: str, rows: Sequence[Row], folder: Path) -> Path:
    """Write folder/name.svg, with the same bytes for the same rows."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(_case(row) for row in rows))
    contenders = list(dict.fromkeys(_contender(row) for row in rows))
    bars = len(rows) + len(cases)
    with mpl.rc_context({"svg.hashsalt": "guda_fast", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(11, 1.4 + 0.16 * bars), layout="constrained")
        speed, bandwidth = figure.subplots(1, 2, sharey=True)
        _bars(speed, rows, cases, contenders, "ratio")
        speed.set_xlabel("times the rival's speed")
        speed.axvline(1.0, color="black", linewidth=0.8)
        _bars(bandwidth, rows, cases, contenders, "gb_per_s")
        bandwidth.set_xlabel("GB/s of the bytes that must move")
        first = rows[0]
        figure.suptitle(f"{name}: {first['device']}, torch {first['torch']}, {first['date']}")
        figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=len(contenders))
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{name}.svg"
        figure.savefig(target, metadata={"Date": None})
    return target


def _case(row: Row) -> str:
    return f"{row['op']} {row['dtype']}\n{row['shapes']}"


def _contender(row: Row) -> str:
    threads = "" if row["threads"] == "1" else f", {row['threads']} threads"
    return f"{row['backend']} ({row['instruction_set']}{threads})"


def _bars(axes: Any, rows: Sequence[Row], cases: Sequence[str], contenders: Sequence[str], column: str) -> None:
    """Horizontal bars, the first case on top, one bar's height apart."""
    at, ticks, position = {}, [], 0
    for case in cases:
        own = [row for row in rows if _case(row) == case]
        ticks.append(position + (len(own) - 1) / 2)
        for row in own:
            at[case, _contender(row)] = (position, float(row[column]))
            position += 1
        position += 1
    for number, contender in enumerate(contenders):
        points = [at[case, contender] for case in cases if (case, contender) in at]
        colour = COLOURS[number % len(COLOURS)]
        axes.barh([y for y, _ in points], [x for _, x in points], height=0.9, color=colour, label=contender)
        for y, x in points:
            axes.text(x, y, f" {x:.3g}", va="center", fontsize=6)
    axes.set_yticks(ticks, cases)
    axes.set_ylim(position - 1, -1)
    axes.spines[["top", "right"]].set_visible(False)
