"""One picture of a result: every query with its top three groups and their scores."""

from __future__ import annotations

import bisect
import colorsys
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from guda_fast._files import atomic_write
from guda_fast._validate import check_int, describe
from guda_fast.evaluation._matplotlib import load_matplotlib
from guda_fast.evaluation.metrics import FloatArray, check_names, check_scores, descending_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WHERE = "ranking_figure"
_TOP = 3
_DPI = 150
_LARGEST_SIDE = 2**16 - 1  # pixels, a limit of the Agg renderer

# Inches.
_MARGIN = 0.35
_IMAGE = 0.93
_IMAGE_TO_BARS = 0.10
_BARS = 1.42
_PANEL_WIDTH = _IMAGE + _IMAGE_TO_BARS + _BARS
_CAPTION = 0.17
_PANEL_HEIGHT = _CAPTION + _IMAGE
_BETWEEN_COLUMNS = 0.34
_BETWEEN_ROWS = 0.24
_BAR_HEIGHT = 0.095
_SWATCH = 0.13
_NARROWEST = 7.0

# Points.
_TITLE_SIZE = 17.0
_NOTE_SIZE = 10.0
_LABEL_SIZE = 7.2
_CAPTION_SIZE = 6.4

_INK, _PALE_INK, _TRACK, _FRAME = "#1f2430", "#667080", "#eef0f3", "#c9ced6"
_PALETTE = [
    "#4e79a7",
    "#f28e2b",
    "#59a14f",
    "#e15759",
    "#76b7b2",
    "#edc948",
    "#b07aa1",
    "#ff9da7",
    "#9c755f",
    "#86898f",
    "#1f4e79",
    "#b85c00",
    "#2d6a2e",
    "#9b1c31",
    "#2a7f7a",
    "#a58a00",
    "#6a3d7c",
    "#d0648a",
    "#5e4030",
    "#4c5058",
]


def ranking_figure(
    images: torch.Tensor | NDArray[Any],
    names: Sequence[str],
    groups: Sequence[str],
    scores: ArrayLike,
    std_errors: ArrayLike | None,
    path: str | os.PathLike[str],
    *,
    columns: int = 8,
    max_queries: int = 64,
    title: str = "Which training group made each image possible?",
) -> None:
    """Write a PNG with a panel a query: the image, its top three groups, bars for their scores.

    The bars of a query share one scale, from zero to its largest score; whiskers show one standard error. A
    group keeps its colour. Small images are enlarged without smoothing. The file is written whole or not at
    all.

    images: the queries [(N, C, H, W), floating point, C 1 or 3, -1 to 1, N >= 1]
    names: their names, shown above them [N]
    groups: the groups' names [K]
    scores: the scores [(N, K), real and finite, K >= 2]
    std_errors: their standard errors [(N, K), real, >= 0, NaN where unknown; or None]
    path: the file to write [ends in .png]
    columns: panels side by side [at least 1]
    max_queries: the first so many queries are shown [at least 1]
    title: the line on top
    Raises: TypeError, ValueError for other arguments; OSError where the file cannot be written;
        ModuleNotFoundError without matplotlib

    >>> ranking_figure(images, names, bank.groups, scores, std_errors, "ranking.png")  # doctest: +SKIP
    """
    matrix = check_scores(_WHERE, "scores", scores)
    if not len(matrix):
        raise ValueError(f"{_WHERE}: scores must have at least one query, got shape {matrix.shape}")
    total, group_count = matrix.shape
    shown = min(check_int(_WHERE, "max_queries", max_queries, 1), total)
    pixels = _check_images(images, total, shown)
    names = check_names(_WHERE, "names", names, total)
    groups = check_names(_WHERE, "groups", groups, group_count)
    errors = _check_std_errors(std_errors, matrix)
    if not isinstance(title, str):
        raise TypeError(f"{_WHERE}: title must be a string, got {describe(title)}")
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"{_WHERE}: path must end in .png, got {str(path)!r}")
    columns = min(check_int(_WHERE, "columns", columns, 1), shown)
    colours = [_colour(index, group_count) for index in range(group_count)]
    note = _note(shown, total, min(_TOP, group_count), errors is not None)
    legend = list(zip(groups, colours, strict=True)) if group_count <= len(_PALETTE) else []

    page = _Page(load_matplotlib(_WHERE), columns, -(-shown // columns), title, note, legend)
    for index, order in enumerate(descending_order(matrix[:shown])[:, :_TOP]):
        bars = [
            _Bar(groups[k], colours[k], matrix[index, k], np.nan if errors is None else errors[index, k]) for k in order
        ]
        page.panel(index, pixels[index], names[index], bars)
    with atomic_write(target, "wb") as file:
        page.figure.savefig(file, format="png", dpi=_DPI)


@dataclass(frozen=True)
class _Bar:
    group: str
    colour: str
    score: float
    std_error: float


class _Page:
    """The whole picture: one axes object whose units are inches, from the top left corner."""

    def __init__(
        self,
        matplotlib: ModuleType,
        columns: int,
        rows: int,
        title: str,
        note: str,
        legend: Sequence[tuple[str, str]],
    ) -> None:
        self._matplotlib = matplotlib
        self._columns = columns
        content = columns * (_PANEL_WIDTH + _BETWEEN_COLUMNS) - _BETWEEN_COLUMNS
        self._width = max(content, _NARROWEST) + 2 * _MARGIN
        self._left = (self._width - content) / 2
        self.figure: Figure = matplotlib.figure.Figure(dpi=_DPI, facecolor="white")
        self._renderer = matplotlib.backends.backend_agg.FigureCanvasAgg(self.figure).get_renderer()
        self._axes: Axes = self.figure.add_axes((0, 0, 1, 1), frameon=False)
        self._top = self._header(title, note, legend) + 0.22
        height = self._top + rows * (_PANEL_HEIGHT + _BETWEEN_ROWS) - _BETWEEN_ROWS + _MARGIN
        if max(self._width, height) * _DPI > _LARGEST_SIDE:
            raise ValueError(
                f"{_WHERE}: columns and max_queries must give a picture of at most {_LARGEST_SIDE} pixels "
                f"a side, got {columns} x {rows} panels"
            )
        self.figure.set_size_inches(self._width, height)
        self._axes.set(xlim=(0, self._width), ylim=(height, 0), autoscale_on=False, xticks=[], yticks=[])

    def panel(self, index: int, pixels: FloatArray, name: str, bars: Sequence[_Bar]) -> None:
        """Draw query ``index``: its name, its image (pixels of shape (C, H, W)) and its bars."""
        row, column = divmod(index, self._columns)
        x = self._left + column * (_PANEL_WIDTH + _BETWEEN_COLUMNS)
        y = self._top + row * (_PANEL_HEIGHT + _BETWEEN_ROWS)
        self._text(x, y + 0.10, self._shorten(name, _CAPTION_SIZE, _PANEL_WIDTH, keep_end=True), _CAPTION_SIZE)
        self._image(x, y + _CAPTION, pixels)
        finite_errors = [0.0 if np.isnan(bar.std_error) else bar.std_error for bar in bars]
        low = min(0.0, *(bar.score - error for bar, error in zip(bars, finite_errors, strict=True)))
        high = max(0.0, *(bar.score + error for bar, error in zip(bars, finite_errors, strict=True)))
        left = x + _IMAGE + _IMAGE_TO_BARS
        scale = _BARS / (high - low) if high > low else 0.0
        for place, bar in enumerate(bars):
            self._bar(
                left,
                y + _CAPTION + place * _IMAGE / _TOP,
                bar,
                lambda v: left + (v - low) * scale,
                place == 0,
            )

    def _bar(self, x: float, y: float, bar: _Bar, at: Callable[[float], float], first: bool) -> None:
        weight = "bold" if first else "normal"
        score = _number(bar.score)
        room = _BARS - self._measure(score, _LABEL_SIZE, weight) - 0.08
        group = self._shorten(bar.group, _LABEL_SIZE, room, weight=weight)
        self._text(x, y + 0.125, group, _LABEL_SIZE, colour=_INK, weight=weight)
        self._text(x + _BARS, y + 0.125, score, _LABEL_SIZE, colour=_INK, weight=weight, align="right")
        top, middle = y + 0.165, y + 0.165 + _BAR_HEIGHT / 2
        self._rectangle(x, top, _BARS, _BAR_HEIGHT, _TRACK)
        self._rectangle(at(0.0), top, at(bar.score) - at(0.0), _BAR_HEIGHT, bar.colour)
        # The zero line, where it is not the edge.
        if at(0.0) > x:
            self._axes.plot([at(0.0)] * 2, [top - 0.015, top + _BAR_HEIGHT + 0.015], color=_PALE_INK, linewidth=0.8)
        if bar.std_error > 0:
            ends = [at(bar.score - bar.std_error), at(bar.score + bar.std_error)]
            self._axes.plot(
                ends, [middle] * 2, color=_INK, linewidth=0.9, marker="|", markersize=4, solid_capstyle="butt"
            )

    def _image(self, x: float, y: float, pixels: FloatArray) -> None:
        _, rows, columns = pixels.shape
        scale = _IMAGE / max(rows, columns)
        width, height = columns * scale, rows * scale
        x, y = x + (_IMAGE - width) / 2, y + (_IMAGE - height) / 2
        grey = (np.clip(pixels, -1, 1) + 1) / 2
        self._axes.imshow(
            np.broadcast_to(grey.transpose(1, 2, 0), (rows, columns, 3)),
            extent=(x, x + width, y + height, y),
            aspect="auto",
            interpolation="nearest" if max(rows, columns) <= _IMAGE * _DPI else "antialiased",
        )
        self._rectangle(x, y, width, height, "none", edge=_FRAME)

    def _header(self, title: str, note: str, legend: Sequence[tuple[str, str]]) -> float:
        """Draw title, explanation and colours across the page; return how far down they reach."""
        y = _MARGIN
        room = self._width - 2 * _MARGIN
        for line in self._wrap(title, _TITLE_SIZE, room, weight="bold"):
            self._text(_MARGIN, y + 0.18, line, _TITLE_SIZE, colour=_INK, weight="bold")
            y += 0.31
        for line in self._wrap(note, _NOTE_SIZE, room):
            self._text(_MARGIN, y + 0.13, line, _NOTE_SIZE)
            y += 0.19
        x, y = _MARGIN, y + 0.10
        for group, colour in legend:
            label = self._shorten(group, _NOTE_SIZE, room - 2 * _SWATCH)
            width = 1.5 * _SWATCH + self._measure(label, _NOTE_SIZE)
            if x > _MARGIN and x + width > self._width - _MARGIN:
                x, y = _MARGIN, y + 0.2
            self._rectangle(x, y, _SWATCH, _SWATCH, colour)
            self._text(x + 1.5 * _SWATCH, y + _SWATCH - 0.01, label, _NOTE_SIZE, colour=_INK)
            x += width + 0.22
        return y + _SWATCH if legend else y

    def _rectangle(self, x: float, y: float, width: float, height: float, fill: str, edge: str = "none") -> None:
        patch = self._matplotlib.patches.Rectangle
        self._axes.add_patch(patch((x, y), width, height, facecolor=fill, edgecolor=edge, linewidth=0.6))

    def _text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        *,
        colour: str = _PALE_INK,
        weight: str = "normal",
        align: str = "left",
    ) -> None:
        # Names are data: a dollar sign in one must not start a formula.
        self._axes.text(
            x,
            y,
            text,
            fontsize=size,
            color=colour,
            fontweight=weight,
            horizontalalignment=align,
            parse_math=False,
        )

    def _measure(self, text: str, size: float, weight: str = "normal") -> float:
        """Width of one line of text in inches."""
        font = self._matplotlib.font_manager.FontProperties(size=size, weight=weight)
        width, _, _ = self._renderer.get_text_width_height_descent(text, font, ismath=False)
        return float(width) / _DPI

    def _shorten(self, text: str, size: float, room: float, *, weight: str = "normal", keep_end: bool = False) -> str:
        """The longest start (or end) of the text, on one line, that fits with an ellipsis."""
        text = " ".join(text.split())
        if self._measure(text, size, weight) <= room:
            return text

        def cut(kept: int) -> str:
            return "…" + text[-kept:].lstrip() if keep_end else text[:kept].rstrip() + "…"

        lengths = range(len(text))
        too_long = bisect.bisect_right(lengths, room, lo=1, key=lambda kept: self._measure(cut(kept), size, weight))
        return cut(max(1, too_long - 1))

    def _wrap(self, text: str, size: float, room: float, weight: str = "normal") -> list[str]:
        lines: list[str] = []
        for word in text.split():
            longer = f"{lines[-1]} {word}" if lines else word
            if lines and self._measure(longer, size, weight) <= room:
                lines[-1] = longer
            else:
                lines.append(self._shorten(word, size, room, weight=weight))
        return lines


def _note(shown: int, total: int, top: int, with_errors: bool) -> str:
    first = f"The first {shown} of {total} queries" if shown < total else f"{total} queries"
    note = (
        f"{'The query' if total == 1 else first + ', each'} with its {top} highest-scoring groups. "
        "A score is how much less likely the image becomes without the group; bars are scaled to the largest "
        "of their query"
    )
    return note + ("; whiskers: ± 1 standard error." if with_errors else ".")


def _number(value: float) -> str:
    """Three significant digits or whole thousands, with a true minus sign."""
    text = f"{value:,.0f}" if 999.5 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _colour(index: int, groups: int) -> str:
    if groups <= len(_PALETTE):
        return _PALETTE[index]
    # Hues a golden section apart stay apart however many there are.
    rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1, (0.55, 0.75)[index % 2], (0.85, 0.65)[index // 2 % 2])
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def _check_images(images: torch.Tensor | NDArray[Any], total: int, shown: int) -> FloatArray:
    """Check all images' shape and type, and the values of the first ``shown``; return those as float64."""
    if not isinstance(images, torch.Tensor | np.ndarray):
        raise TypeError(f"{_WHERE}: images must be a torch.Tensor or a NumPy array, got {describe(images)}")
    shape = tuple(images.shape)
    found = f"{str(images.dtype).removeprefix('torch.')} of shape {shape}"
    if len(shape) != 4 or shape[0] != total or shape[1] not in (1, 3) or 0 in shape:
        wanted = f"({total}, C, H, W), C 1 or 3, as scores has {total} rows"
        raise ValueError(f"{_WHERE}: images must have shape {wanted}, got {found}")
    if isinstance(images, torch.Tensor):
        floating = images.is_floating_point()
        array = images[:shown].detach().cpu().double().numpy()
    else:
        floating = images.dtype.kind == "f"
        array = images[:shown].astype(np.float64)
    if not floating:
        raise TypeError(f"{_WHERE}: images must be floating point, got {found}")
    # Room for the rounding of a cast; the comparison is also false for NaN.
    if not (np.abs(array) <= 1.01).all():
        raise ValueError(f"{_WHERE}: images must be between -1 and 1, got {array.min()} to {array.max()}")
    return array


def _check_std_errors(std_errors: ArrayLike | None, scores: FloatArray) -> FloatArray | None:
    if std_errors is None:
        return None
    value = std_errors.detach().cpu().double().numpy() if isinstance(std_errors, torch.Tensor) else std_errors
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{_WHERE}: std_errors must be real numbers, got {array.dtype} array")
    if array.shape != scores.shape:
        raise ValueError(f"{_WHERE}: std_errors must have shape {scores.shape} as scores, got shape {array.shape}")
    result = array.astype(np.float64, copy=False)
    if (result < 0).any() or np.isinf(result).any():
        raise ValueError(f"{_WHERE}: std_errors must be finite and at least 0, or NaN where unknown")
    return result if (result > 0).any() else None
