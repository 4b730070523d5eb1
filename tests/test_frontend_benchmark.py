"""The benchmark of the frontends: all contenders of a case write scores of the same cells."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import frontends


def cells_of(path: object) -> dict[tuple[str, str], float]:
    assert isinstance(path, Path)
    rows = list(csv.reader(path.read_text().splitlines()))[1:]
    # The script has zeros for the classes without a model.
    return {(image, number): float(score) for image, number, score in rows if float(score)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contenders_do_the_same_job(dtype: torch.dtype) -> None:
    case = frontends.scores_case(dtype, quick=True)
    assert case.check is not None
    case.check()
    expected = cells_of(case.rival.call(0))
    assert len(expected) == 3
    found = {contender.backend: cells_of(contender.call(0)) for contender in case.contenders}
    assert set(found) >= {"guda_fast, contract noise", "guda_fast, reference noise"}
    assert all(cells.keys() == expected.keys() for cells in found.values())
    if dtype == torch.float32:
        values = np.array([found["guda_fast, reference noise"][cell] for cell in expected])
        wanted = np.array([*expected.values()])
        np.testing.assert_allclose(values, wanted, rtol=0, atol=frontends.TOLERANCE * np.abs(wanted).max())


def test_a_frontend_that_disagrees_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    files = frontends.Files(frontends.Job(network="tiny", images=3, last=100))
    ours = files.ours
    # Contract noise where the script's is promised.
    monkeypatch.setattr(files, "ours", lambda name, *options, last: ours(name, last=last))
    with pytest.raises(RuntimeError, match="must give the scores in reference noise, got a difference of"):
        frontends.check_scores(files)
    # The script's noise where the contract's is promised.
    monkeypatch.setattr(files, "ours", lambda name, *options, last: ours(name, "--noise", "reference", last=last))
    with pytest.raises(RuntimeError, match="must give the scores in contract noise, got a difference of"):
        frontends.check_scores(files)
