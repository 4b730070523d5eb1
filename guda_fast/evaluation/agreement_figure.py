"""One picture of an agreement table: a panel a metric, a dot and its interval a method."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from guda_fast._files import atomic_write
from guda_fast._validate import check_int
from guda_fast.evaluation._matplotlib import load_matplotlib
from guda_fast.evaluation.table import FLOOR, RANDOM, AgreementRow, AgreementTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WHERE = "agreement_figure"
_DPI = 150
_PANEL_WIDTH, _ROW_HEIGHT, _PANEL_MARGIN, _LABELS = 2.3, 0.28, 0.75, 1.8  # inches
_BANDS = {FLOOR: "#59a14f", RANDOM: "#86898f"}
_INK, _PALE = "#1f2430", "#c9ced6"


def agreement_figure(
    table: AgreementTable,
    path: str | os.PathLike[str],
    *,
    columns: int = 4,
    title: str = "Agreement with the oracle",
) -> None:
    """Write a PNG with a panel a metric: each method's mean and interval, over bands for the floor and for random.

    Bars and bands hold the spread over queries, not over training seeds. The file is written whole or not at all.

    table: from ``agreement``
    path: the file to write [ends in .png]
    columns: panels side by side [at least 1]
    title: the line on top
    Raises: TypeError, ValueError for other arguments; OSError where the file cannot be written; ModuleNotFoundError
        without matplotlib

    >>> agreement_figure(agreement(scores, oracle), "agreement.png")  # doctest: +SKIP
    """
    metrics = list(dict.fromkeys(row.metric for row in table.rows))
    methods = [name for name in dict.fromkeys(row.method for row in table.rows) if name not in _BANDS]
    columns = min(check_int(_WHERE, "columns", columns, 1), len(metrics))
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{_WHERE}: path must end in .png, got {str(path)!r}")
    lines = -(-len(metrics) // columns)
    matplotlib = load_matplotlib(_WHERE)
    width = _LABELS + columns * _PANEL_WIDTH
    height = 0.8 + lines * (_PANEL_MARGIN + _ROW_HEIGHT * max(2, len(methods)))
    figure = matplotlib.figure.Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout="constrained")
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for panel, metric in zip(panels, metrics, strict=False):
        _draw(panel, metric, methods, [row for row in table.rows if row.metric == metric])
    for panel in panels[len(metrics) :]:
        panel.set_visible(False)
    figure.suptitle(f"{title}\n{_note(table)}", fontsize=9, color=_INK, parse_math=False)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=_DPI)


def _draw(panel: Axes, metric: str, methods: Sequence[str], rows: Sequence[AgreementRow]) -> None:
    panel.set_title(metric, fontsize=9, color=_INK, parse_math=False)
    panel.set_yticks(range(len(methods)), labels=methods, fontsize=8, parse_math=False)
    panel.set_ylim(len(methods) - 0.5, -0.5)
    panel.tick_params(axis="x", labelsize=7)
    panel.grid(axis="x", color=_PALE, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
    for row in rows:
        if math.isnan(row.mean):
            continue
        colour = _BANDS.get(row.method)
        if colour is not None:
            panel.axvspan(row.low, row.high, color=colour, alpha=0.18, linewidth=0)
            panel.axvline(row.mean, color=colour, linewidth=1.0)
        else:
            y = methods.index(row.method)
            panel.plot([row.low, row.high], [y, y], color=_INK, linewidth=1.2, solid_capstyle="butt")
            panel.plot([row.mean], [y], "o", color=_INK, markersize=4)


def _note(table: AgreementTable) -> str:
    found = {row.method for row in table.rows}
    parts = [f"bars: {100 * table.confidence:g} % bootstrap interval over queries"]
    parts += ["green: the oracle's other seeds"] if FLOOR in found else []
    parts += ["grey: random rankings"] if RANDOM in found else []
    return "; ".join(parts)
