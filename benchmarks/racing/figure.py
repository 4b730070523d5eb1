"""The curves: how many queries get another top group than by the exact protocol, against forwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#aa3377", "#ee6677", "#4477aa", "#66ccee", "#228833", "#ccbb44", "#7f7f7f", "#000000")
COLUMNS = 3


def draw(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """A panel a case, a line a contender, with the same bytes for the same rows."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    lines = -(-len(cases) // COLUMNS)
    with mpl.rc_context({"svg.hashsalt": "guda_fast", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(11, 1.2 + 2.8 * lines), layout="constrained")
        panels = figure.subplots(lines, COLUMNS, squeeze=False).ravel()
        for panel, case in zip(panels, cases, strict=False):
            _panel(panel, case, [row for row in rows if row["case"] == case], contenders)
        for panel in panels[len(cases) :]:
            panel.set_visible(False)
        handles = {
            label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
        figure.savefig(path, metadata={"Date": None})


def _panel(panel: Any, case: str, rows: Sequence[Mapping[str, str]], contenders: Sequence[str]) -> None:
    decisions = max(int(row["decisions"]) for row in rows)
    floor = 0.5 / decisions  # where no query at all is wrong
    for number, contender in enumerate(contenders):
        own = sorted((float(row["cost"]), 1 - float(row["share"])) for row in rows if row["contender"] == contender)
        if own:
            cost, wrong = zip(*own, strict=True)
            shown = [max(value, floor) for value in wrong]
            ours = contender.startswith(("racing", "budget"))
            style = {"linewidth": 1.8 if ours else 0.9, "markersize": 4 if ours else 2.5, "zorder": 3 if ours else 2}
            panel.plot(cost, shown, marker="o", color=COLOURS[number % len(COLOURS)], label=contender, **style)
    panel.axhline(0.01, color="black", linewidth=0.6, linestyle=":")
    panel.set(xscale="log", yscale="log", title=case, xlabel="forwards, as a share of the full protocol's")
    panel.set_ylabel("queries with another top group")
    panel.spines[["top", "right"]].set_visible(False)
