"""The linear datamodelling score against a plain loop, scipy, and its own symmetries."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from guda_fast.evaluation import bootstrap_mean, lds, linear_agreement


@pytest.fixture
def case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of 20 queries and 6 groups, and 9 models that lack about half of them."""
    rng = np.random.default_rng(4)
    scores, removed = rng.normal(size=(20, 6)), rng.random((9, 6)) < 0.5
    return scores, scores @ removed.T + rng.normal(size=(20, 9)), removed


def test_lds_is_the_plain_loop(case) -> None:
    scores, outcomes, removed = case
    for row, found, value in zip(scores, outcomes, lds(*case), strict=True):
        predicted = [sum(row[k] for k in range(6) if subset[k]) for subset in removed]
        # Ranks are halves of integers up to 9, so both sides are a few roundings from the exact quotient.
        assert value == pytest.approx(stats.spearmanr(predicted, found).statistic, abs=16 * 2.0**-53)


def test_groups_that_remain_give_the_same_as_groups_removed(case) -> None:
    scores, outcomes, removed = case
    # Integers, so that the sums of both sides are exact and have the same ties.
    whole = np.round(10 * scores)
    np.testing.assert_array_equal(lds(whole, outcomes, removed), lds(whole, -outcomes, ~removed))


def test_exact_sums_and_their_opposite() -> None:
    removed = np.eye(3, dtype=bool)
    scores = np.array([[1.0, 5.0, 2.0]])
    assert lds(scores, scores, removed) == 1
    assert lds(scores, -scores, removed) == -1
    assert np.isnan(lds(scores, np.ones((1, 3)), removed)).all()


def test_rows_are_means_with_intervals(case) -> None:
    scores, outcomes, removed = case
    table = linear_agreement({"a": scores, "b": -scores}, outcomes, removed, seed=3, confidence=0.9)
    assert [(row.method, row.metric) for row in table.rows] == [("a", "LDS"), ("b", "LDS")]
    expected = bootstrap_mean(lds(*case), seed=3, confidence=0.9)
    assert (table.rows[0].mean, table.rows[0].low, table.rows[0].high) == expected[:3]
    assert table.rows[1].mean < 0 < table.rows[0].mean


def test_bad_arguments(case) -> None:
    scores, outcomes, removed = case
    with pytest.raises(TypeError, match="lds: removed must be bool, got int64 array"):
        lds(scores, outcomes, removed.astype(np.int64))
    with pytest.raises(ValueError, match=r"lds: removed must have shape \(9, 6\), a row an outcome .* \(6, 9\)"):
        lds(scores, outcomes, removed.T)
    with pytest.raises(ValueError, match=r"lds: outcomes must have 20 rows as scores, got .*\(19, 9\)"):
        lds(scores, outcomes[1:], removed)
    with pytest.raises(ValueError, match="lds: outcomes must have at least two"):
        lds(scores, outcomes[:, :1], removed[:1])
