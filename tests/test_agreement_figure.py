"""The agreement figure: what is drawn where, and that the file is whole or absent."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from guda_fast.evaluation import AgreementRow, AgreementTable, agreement_figure

pytest.importorskip("matplotlib")

FLOOR, RANDOM = "oracle, other seed", "random"


def table_of(*methods: str, metrics: tuple[str, ...] = ("top-1", "MRR")) -> AgreementTable:
    means = {FLOOR: 0.75, RANDOM: 0.25}
    rows = [
        AgreementRow(method, metric, mean, mean - 0.0625, mean + 0.125, 9, 0)
        for method in methods
        for metric in metrics
        for mean in [means.get(method, 0.5)]
    ]
    return AgreementTable(tuple(rows), 0.95, 2 if FLOOR in methods else 1)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved while the test runs."""
    from matplotlib.figure import Figure

    found: list[Any] = []
    save = Figure.savefig

    def record(self: Any, *args: Any, **options: Any) -> None:
        found.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return found


def test_a_panel_a_metric_with_bands_and_bars(drawn: list[Any], tmp_path: Path) -> None:
    agreement_figure(table_of("GUDA", "a $b$", FLOOR, RANDOM), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
    panels = drawn[0].axes
    assert [panel.get_title() for panel in panels] == ["top-1", "MRR"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["GUDA", "a $b$"]
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in panels[0].patches]
    assert spans == [(0.6875, 0.875), (0.1875, 0.375)]
    bars = [tuple(line.get_xdata()) for line in panels[0].lines if len(line.get_xdata()) == 2]
    assert bars.count((0.4375, 0.625)) == 2 and (0.75, 0.75) in bars and (0.25, 0.25) in bars


def test_panels_that_are_not_needed_are_empty_and_missing_values_leave_gaps(drawn: list[Any], tmp_path: Path) -> None:
    missing = AgreementRow("GUDA", "Spearman", np.nan, np.nan, np.nan, 0, 9)
    table = table_of("GUDA", metrics=("top-1", "MRR"))
    agreement_figure(AgreementTable((*table.rows, missing), 0.95), tmp_path / "a.png", columns=2)
    assert [panel.get_visible() for panel in drawn[0].axes] == [True, True, True, False]
    assert [len(panel.lines) for panel in drawn[0].axes] == [2, 2, 0, 0]


def test_bad_arguments_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="agreement_figure: path must end in .png, got 'a.pdf'"):
        agreement_figure(table_of("GUDA"), "a.pdf")
    with pytest.raises(ValueError, match="agreement_figure: columns must be at least 1, got 0"):
        agreement_figure(table_of("GUDA"), tmp_path / "a.png", columns=0)
    assert os.listdir(tmp_path) == []


def test_a_disk_error_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"cannot write: No space left on device: '.*a\.png'"):
        agreement_figure(table_of("GUDA"), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_a_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"agreement_figure needs matplotlib.*guda-fast\[report\]"):
        agreement_figure(table_of("GUDA"), tmp_path / "a.png")
