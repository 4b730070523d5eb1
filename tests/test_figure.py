"""The ranking figure: what is drawn where, and that the file is whole or absent."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from guda_fast.evaluation import figure as figure_module
from guda_fast.evaluation import ranking_figure

matplotlib = pytest.importorskip("matplotlib")

DPI = 150
# The first three group colours, and the image's own: nothing else in the picture has them.
BLUE, ORANGE, GREEN, MAGENTA = (0x4E, 0x79, 0xA7), (0xF2, 0x8E, 0x2B), (0x59, 0xA1, 0x4F), (255, 0, 255)
BAR = round(1.42 * DPI)


def read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def longest_run(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> int:
    """Pixels in the longest horizontal run of one colour."""
    same = (picture == colour).all(axis=2)
    edges = np.diff(np.pad(same, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, stops = np.nonzero(edges == 1)[1], np.nonzero(edges == -1)[1]
    return int((stops - starts).max(initial=0))


def arguments(count: int = 1, group_count: int = 3, /, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    given = {
        "images": rng.uniform(-1, 1, size=(count, 1, 8, 8)),
        "names": [f"query_{index:04d}" for index in range(count)],
        "groups": [f"group {index}" for index in range(group_count)],
        "scores": rng.normal(size=(count, group_count)),
        "std_errors": rng.uniform(0, 0.5, size=(count, group_count)),
    }
    return {**given, **changes}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved while the test runs."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig

    def keep(self: Any, *args: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_bars_are_as_long_as_their_scores(tmp_path: Path) -> None:
    ranking_figure(**arguments(scores=[[1.0, 4.0, 2.0]], std_errors=None), path=tmp_path / "a.png")
    picture = read(tmp_path / "a.png")
    for colour, share in ((BLUE, 1 / 4), (ORANGE, 1), (GREEN, 1 / 2)):
        # Each end is antialiased: up to a pixel less at either.
        assert abs(longest_run(picture, colour) - share * BAR) <= 2


def test_negative_scores_go_to_the_left_of_zero(tmp_path: Path) -> None:
    ranking_figure(**arguments(scores=[[3.0, -1.0, -2.0]], std_errors=None), path=tmp_path / "a.png")
    picture = read(tmp_path / "a.png")
    ends = {}
    for colour, share in ((BLUE, 3 / 5), (ORANGE, 1 / 5), (GREEN, 2 / 5)):
        # The zero line covers up to two pixels of a bar's end.
        assert abs(longest_run(picture, colour) - share * BAR) <= 4
        # Right of the image, and so without the swatches of the legend.
        columns = np.nonzero((picture[:, picture.shape[1] // 2 - 40 :] == colour).all(axis=2))[1]
        ends[colour] = columns.min(), columns.max()
    zero = ends[BLUE][0]
    assert abs(ends[ORANGE][1] - zero) <= 4 and abs(ends[GREEN][1] - zero) <= 4


def test_whiskers_span_one_standard_error_each_way(tmp_path: Path, drawn: list[Any]) -> None:
    errors = [[0.5, math.nan, 0.0]]
    ranking_figure(**arguments(scores=[[4.0, 2.0, 1.0]], std_errors=errors), path=tmp_path / "a.png")
    (whisker,) = drawn[0].axes[0].lines
    low, high = whisker.get_xdata()
    # The scale reaches from zero to score plus error.
    assert high - low == pytest.approx(1.42 * 1.0 / 4.5)


def test_top_three_groups_in_order(tmp_path: Path, drawn: list[Any]) -> None:
    given = arguments(2, 5, scores=[[1.0, 5.0, 5.0, 9.0, 0.0], [-5.0, -1.0, -4.0, -2.0, -3.0]], std_errors=None)
    ranking_figure(**given, path=tmp_path / "a.png")
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    first, second = texts.index("query_0000"), texts.index("query_0001")
    assert texts[first + 1 : second] == ["group 3", "9", "group 1", "5", "group 2", "5"]
    assert texts[second + 1 :] == ["group 1", "\u22121", "group 3", "\u22122", "group 4", "\u22123"]


def test_small_images_are_enlarged_without_smoothing(tmp_path: Path) -> None:
    pixels = np.full((1, 3, 2, 2), -1.0)
    pixels[0, [0, 2], 0, 1] = 1
    ranking_figure(**arguments(images=pixels), path=tmp_path / "a.png")
    picture = read(tmp_path / "a.png")
    rows, columns = np.nonzero((picture == MAGENTA).all(axis=2))
    side = 0.93 * DPI / 2
    # A quarter of the image, upper right, less the thin frame on two of its sides.
    assert abs(len(rows) - side**2) <= 6 * side
    assert abs(np.ptp(rows) - side) <= 3 and abs(np.ptp(columns) - side) <= 3
    below = picture[rows.max() + 4, columns.min() : columns.max()]
    assert (below == 0).all()


@pytest.mark.parametrize(("count", "columns", "shown", "grid"), [(1, 8, 9, (1, 1)), (10, 4, 7, (2, 4))])
def test_size_and_panels(tmp_path: Path, count: int, columns: int, shown: int, grid: tuple[int, int]) -> None:
    images = np.zeros((count, 3, 4, 4))
    images[:, [0, 2]], images[:, 1] = 1, -1
    given = arguments(count, images=images)
    ranking_figure(**given, path=tmp_path / "a.png", columns=columns, max_queries=shown)
    picture = read(tmp_path / "a.png")
    width = max(7.0, grid[1] * (0.93 + 0.10 + 1.42 + 0.34) - 0.34) + 2 * 0.35
    assert abs(picture.shape[1] - width * DPI) <= 1
    # Every panel's image is there, and nothing touches the margin.
    magenta = (picture == MAGENTA).all(axis=2).sum()
    expected = min(count, shown) * (0.93 * DPI) ** 2
    assert 0.95 * expected < magenta <= expected
    margin = round(0.3 * DPI)
    for edge in (picture[:margin], picture[-margin:], picture[:, :margin], picture[:, -margin:]):
        assert (edge == 255).all()


@pytest.mark.parametrize(("count", "groups"), [(1, 2), (1, 20), (17, 10), (3, 1000)])
def test_no_text_is_clipped_or_overlaps(tmp_path: Path, drawn: list[Any], count: int, groups: int) -> None:
    given = arguments(
        count,
        groups,
        names=[f"/a/long/path/of/generated images/{'x' * index}/{index}.png" for index in range(count)],
        groups=[f"the style of painter {index} $ and $ all of the school" for index in range(groups)],
        scores=np.random.default_rng(1).normal(size=(count, groups)) * 12345.678,
    )
    ranking_figure(**given, path=tmp_path / "a.png")
    boxes = np.array([text.get_window_extent().extents for text in drawn[0].axes[0].texts])
    width, height = drawn[0].bbox.size
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    # Boxes of neighbouring lines may share the empty part of a line's height: a fifth is left out.
    inset = 0.1 * (boxes[:, 3] - boxes[:, 1])
    x0, x1, y0, y1 = boxes[:, 0], boxes[:, 2], boxes[:, 1] + inset, boxes[:, 3] - inset
    overlap = (x0[:, None] < x1) & (x0 < x1[:, None]) & (y0[:, None] < y1) & (y0 < y1[:, None])
    assert overlap.sum() == len(boxes)


def test_explanation_says_what_is_shown(tmp_path: Path, drawn: list[Any]) -> None:
    def explanation(**given: Any) -> str:
        ranking_figure(**given, path=tmp_path / "a.png", title="Digits")
        return " ".join(text.get_text() for text in drawn[-1].axes[0].texts[:4])

    assert "Digits The first 2 of 5 queries" in explanation(**arguments(5), max_queries=2)
    assert "1 standard error" in explanation(**arguments(1))
    assert "standard error" not in explanation(**arguments(1, std_errors=None))
    assert "standard error" not in explanation(**arguments(1, std_errors=np.full((1, 3), np.nan)))


def test_numbers() -> None:
    texts = [figure_module._number(value) for value in (0.0, 1.25e-7, -0.5, 999.6, -12345.6, 1.5e9)]
    assert texts == ["0", "1.25e\u221207", "\u22120.5", "1,000", "\u221212,346", "1.5e+09"]


@pytest.mark.parametrize("groups", [2, 20, 21, 300])
def test_every_group_has_a_colour_of_its_own(groups: int) -> None:
    assert len({figure_module._colour(index, groups) for index in range(groups)}) == groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_and_arrays_give_the_same_file(tmp_path: Path, dtype: torch.dtype) -> None:
    images = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8).to(dtype)
    given = arguments(2)
    ranking_figure(**{**given, "images": images.requires_grad_()}, path=tmp_path / "tensor.png")
    ranking_figure(**{**given, "images": images.detach().double().numpy()}, path=str(tmp_path / "array.png"))
    assert (tmp_path / "tensor.png").read_bytes() == (tmp_path / "array.png").read_bytes()


def test_all_scores_zero(tmp_path: Path) -> None:
    ranking_figure(**arguments(scores=np.zeros((1, 3)), std_errors=np.zeros((1, 3))), path=tmp_path / "a.png")
    # No bar: what is left of the colour is its swatch in the legend.
    assert longest_run(read(tmp_path / "a.png"), BLUE) <= 0.13 * DPI


@pytest.mark.parametrize("step", ["savefig", "replace"])
def test_a_disk_error_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    from matplotlib.figure import Figure

    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os if step == "replace" else Figure, step, fail)
    with pytest.raises(OSError, match=r"cannot write: No space left on device: '.*a\.png'"):
        ranking_figure(**arguments(), path=tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot write.*absent.a\.png"):
        ranking_figure(**arguments(), path=tmp_path / "absent" / "a.png")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": [[0.0]]}, TypeError, "images must be a torch.Tensor or a NumPy array, got "),
        (
            {"images": np.zeros((2, 1, 8, 8))},
            ValueError,
            r"images must have shape \(1, C, H, W\).*got float64 of",
        ),
        (
            {"images": np.zeros((1, 2, 8, 8))},
            ValueError,
            r"images must have shape .* C 1 or 3.*\(1, 2, 8, 8\)",
        ),
        ({"images": np.zeros((1, 1, 0, 8))}, ValueError, "images must have shape"),
        ({"images": torch.zeros(1, 8, 8)}, ValueError, "images must have shape"),
        ({"images": np.zeros((1, 1, 8, 8), np.uint8)}, TypeError, "images must be floating point, got uint8"),
        ({"images": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}, TypeError, "images must be floating point"),
        (
            {"images": np.full((1, 1, 8, 8), 255.0)},
            ValueError,
            "images must be between -1 and 1, got 255.0 to",
        ),
        (
            {"images": np.full((1, 1, 8, 8), np.nan)},
            ValueError,
            "images must be between -1 and 1, got nan to",
        ),
        ({"names": []}, ValueError, "names must have one name for each of 1, got 0 names"),
        ({"groups": ["a"]}, ValueError, "groups must have one name for each of 3, got 1 names"),
        ({"scores": [[np.nan, 1, 2]]}, ValueError, "scores must be finite, got nan at query 0, group 0"),
        ({"scores": np.empty((0, 3))}, ValueError, "scores must have at least one query"),
        ({"std_errors": [[1.0, 2.0]]}, ValueError, r"std_errors must have shape \(1, 3\) as scores"),
        ({"std_errors": [["a", "b", "c"]]}, TypeError, "std_errors must be real numbers"),
        ({"std_errors": [[-1.0, 0, 0]]}, ValueError, "std_errors must be finite and at least 0, or NaN"),
        ({"std_errors": [[np.inf, 0, 0]]}, ValueError, "std_errors must be finite and at least 0, or NaN"),
        ({"columns": 0}, ValueError, "columns must be at least 1, got 0"),
        ({"max_queries": 0}, ValueError, "max_queries must be at least 1, got 0"),
        ({"title": None}, TypeError, "title must be a string"),
        ({"path": "a.pdf"}, ValueError, "path must end in .png, got 'a.pdf'"),
    ],
)
def test_bad_arguments(tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"ranking_figure: {message}"):
        ranking_figure(**{**arguments(), "path": tmp_path / "a.png", **changes})
    assert os.listdir(tmp_path) == []


def test_a_picture_too_large_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ranking_figure: .* at most 65535 pixels a side, got 1 x 400 panels"):
        ranking_figure(**arguments(400), path=tmp_path / "a.png", columns=1, max_queries=400)


def test_a_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"ranking_figure needs matplotlib.*guda-fast\[report\]"):
        ranking_figure(**arguments(), path=tmp_path / "a.png")


def test_extras_are_imported_where_they_are_used() -> None:
    code = "import sys, guda_fast.evaluation; print({'matplotlib', 'scipy', 'sklearn'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
