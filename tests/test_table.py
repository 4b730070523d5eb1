"""Agreement and ranking tables."""

from __future__ import annotations

import csv
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from guda_fast.evaluation import (
    AgreementRow,
    AgreementTable,
    agreement,
    bootstrap_mean,
    mrr,
    ndcg,
    ranking,
    spearman,
    top_1_agreement,
)

Array = NDArray[np.float64]


@pytest.fixture
def pair() -> tuple[Array, Array]:
    rng = np.random.default_rng(3)
    oracle = rng.normal(size=(40, 6))
    return oracle + rng.normal(size=oracle.shape), oracle


def test_rows_are_the_metrics_with_their_intervals(pair: tuple[Array, Array]) -> None:
    table = agreement({"GUDA": pair[0], "LOGO, other seed": pair[1]}, pair[1], seed=5, confidence=0.8)
    names = ["top-1", "MRR", "NDCG@3", "Spearman"]
    methods = ["GUDA", "LOGO, other seed", "random"]
    assert [(row.method, row.metric) for row in table.rows] == [(a, b) for a in methods for b in names]
    values = [top_1_agreement(*pair), mrr(*pair), ndcg(*pair, 3), spearman(*pair)]
    for row, per_query in zip(table.rows[:4], values, strict=True):
        expected = bootstrap_mean(per_query, confidence=0.8, seed=5)
        assert (row.mean, row.low, row.high, row.queries, row.missing) == expected
        assert row.low < row.mean < row.high
    assert all(row.mean == row.low == row.high == 1 for row in table.rows[4:8])


def test_random_rows_are_the_expected_values(pair: tuple[Array, Array]) -> None:
    table = agreement(*pair, metrics=["top-1", "top-2", "MRR", "NDCG@3", "NDCG@6", "Spearman"])
    random = {row.metric: row for row in table.rows if row.method == "random"}
    discounts = 1 / np.log2(np.arange(2, 8))
    gains = 2.0 ** np.arange(5, -1, -1) - 1
    harmonic = sum(1 / rank for rank in range(1, 7)) / 6
    expected = {
        "top-1": 1 / 6,
        "top-2": 2 / 6,
        "MRR": harmonic,
        "NDCG@3": gains.mean() * discounts[:3].sum() / (gains[:3] * discounts[:3]).sum(),
        "NDCG@6": gains.mean() * discounts.sum() / (gains * discounts).sum(),
        "Spearman": 0.0,
    }
    for metric, value in expected.items():
        row = random[metric]
        # 10,000 rankings, standard deviation at most 0.5 (1 / sqrt(5) for Spearman): four standard errors.
        assert abs(row.mean - value) < 4 * 0.5 / math.sqrt(10_000)
        assert (row.queries, row.missing) == (40, 0)
    # The range of the mean over 40 queries: 1.96 standard deviations, of a Bernoulli for top-1, to either
    # side, and half a step of 1/40.
    half = 1.959964 * math.sqrt(1 / 6 * 5 / 6 / 40)
    assert random["top-1"].high - random["top-1"].low == pytest.approx(2 * half, abs=1 / 40)
    # Spearman's variance is 1 / (K - 1). The tails of K = 6 are a little lighter than normal: 10 %.
    width = random["Spearman"].high - random["Spearman"].low
    assert width == pytest.approx(2 * 1.959964 * math.sqrt(1 / 5 / 40), rel=0.1)


def test_constant_rows_are_missing_in_every_method(pair: tuple[Array, Array]) -> None:
    s, g = pair[0].copy(), pair[1].copy()
    s[0], g[1], g[2] = 0, 4, 5
    rows = agreement(s, g, metrics=["Spearman"]).rows
    assert [(row.method, row.queries, row.missing) for row in rows] == [("scores", 37, 3), ("random", 38, 2)]
    rows = agreement(np.zeros((2, 3)), np.ones((2, 3)), metrics=["Kendall"]).rows
    assert all(math.isnan(row.mean) and (row.queries, row.missing) == (0, 2) for row in rows)


def test_gains_are_never_mixed(pair: tuple[Array, Array]) -> None:
    table = agreement(*pair, metrics=["NDCG@2", "NDCG@3"], gain="linear")
    assert [row.metric for row in table.rows[:2]] == ["NDCG@2 (linear)", "NDCG@3 (linear)"]
    assert table.rows[0].mean == pytest.approx(ndcg(*pair, 2, "linear").mean(), rel=1e-12)


def test_two_groups_have_a_default_set() -> None:
    table = agreement([[1.0, 2.0]], [[2.0, 1.0]])
    assert [row.metric for row in table.rows[:4]] == ["top-1", "MRR", "NDCG@2", "Spearman"]


def test_results_are_seeded(pair: tuple[Array, Array]) -> None:
    assert agreement(*pair, seed=1) == agreement(*pair, seed=1)
    assert agreement(*pair, seed=1) != agreement(*pair, seed=2)


def test_markdown_of_agreement() -> None:
    table = agreement({"a|b": [[3.0, 2.0], [0.0, 1.0]]}, [[1.0, 1.0], [0.0, 1.0]], metrics=["top-1", "Spearman"])
    lines = table.to_markdown().splitlines()
    assert len({len(line) for line in lines[:-2]}) == 1
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[:-2]]
    assert cells[0] == ["method", "metric", "mean", "low", "high", "queries", "missing"]
    assert [(cell[:2], cell[-1]) for cell in cells[1]] == [("--", "-")] * 2 + [("--", ":")] * 5
    assert cells[2] == [r"a\|b", "top-1", "1.000", "1.000", "1.000", "2", "0"]
    assert cells[3] == [r"a\|b", "Spearman", "1.000", "1.000", "1.000", "1", "1"]
    assert [row[:2] for row in cells[4:]] == [["random", "top-1"], ["random", "Spearman"]]
    assert lines[-1].startswith(
        "Mean over queries; low and high end the 95 % bootstrap interval over queries. What other"
    )


def test_markdown_has_no_negative_zero() -> None:
    table = AgreementTable((AgreementRow("a", "Kendall", -0.0004, -0.0006, 0.0004, 9, 0),), 0.95)
    assert "| 0.000 | -0.001 | 0.000 |" in table.to_markdown()


def test_missing_is_said_not_zero(tmp_path: Path) -> None:
    table = agreement([[1.0, 1.0]], [[1.0, 2.0]], metrics=["Spearman"])
    assert "| missing | missing | missing |       0 |       1 |" in table.to_markdown()
    table.to_csv(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines()[1] == "scores,Spearman,nan,nan,nan,0,1"


def test_csv_keeps_all_digits(pair: tuple[Array, Array], tmp_path: Path) -> None:
    table = agreement({'GUDA, "quoted"': pair[0]}, pair[1])
    table.to_csv(tmp_path / "agreement.csv")
    with open(tmp_path / "agreement.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for read, row in zip(rows, table.rows, strict=True):
        assert (read["method"], read["metric"]) == (row.method, row.metric)
        assert tuple(float(read[name]) for name in ("mean", "low", "high")) == (row.mean, row.low, row.high)
        assert (read["queries"], read["missing"]) == (str(row.queries), str(row.missing))


def test_csv_is_whole_or_absent(pair: tuple[Array, Array], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = agreement(*pair, metrics=["MRR"])
    with pytest.raises(FileNotFoundError, match=r"cannot write.*absent.a\.csv"):
        table.to_csv(tmp_path / "absent" / "a.csv")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"cannot write: No space left on device: .*a\.csv"):
        table.to_csv(tmp_path / "a.csv")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("scores", "options", "error", "message"),
    [
        ({}, {}, ValueError, "scores must have at least one method"),
        ({1: np.ones((2, 3))}, {}, TypeError, "scores must have method names as keys, got 1"),
        ({"random": np.ones((2, 3))}, {}, ValueError, "a method must have a name other than 'random'"),
        (np.ones((3, 3)), {}, ValueError, r"oracle must have shape \(3, 3\)"),
        (np.ones((2, 3)), {"metrics": ["top-0"]}, ValueError, "metrics must be among .*'RBO'.*got 'top-0'"),
        (
            np.ones((2, 3)),
            {"metrics": ["NDCG@4"]},
            ValueError,
            "k in 'NDCG@4' must be between 1 and 3, got 4",
        ),
        (np.ones((2, 3)), {"metrics": "MRR"}, TypeError, "metrics must be a sequence of strings, got 'MRR'"),
        (np.ones((2, 3)), {"metrics": []}, ValueError, "metrics must have at least one"),
        (np.ones((2, 3)), {"gain": "log"}, ValueError, "gain must be one of"),
        (np.ones((2, 3)), {"confidence": 0}, ValueError, "confidence must be above 0"),
        (np.ones((2, 3)), {"resamples": 0}, ValueError, "resamples must be at least 1"),
        (np.ones((2, 3)), {"seed": -1}, ValueError, "seed must be between 0"),
    ],
)
def test_bad_arguments(scores: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"agreement: {message}"):
        agreement(scores, np.ones((2, 3)), **options)


def test_no_queries_are_refused() -> None:
    empty = np.empty((0, 3))
    with pytest.raises(ValueError, match="agreement: oracle must have at least one query"):
        agreement(empty, empty)
    with pytest.raises(ValueError, match="ranking: scores must have at least one query"):
        ranking(["a", "b", "c"], empty)


def test_ranking_is_hand_computed() -> None:
    # Ranks: 2 1 3 / 1 2 3 / 3 2 1 / 1 2 3 (a tie, the lower group first).
    table = ranking(["cat", "dog", "owl"], [[2.0, 3.0, 1.0], [9.0, 1.0, 0.0], [0.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    assert [row.group for row in table.rows] == ["cat", "dog", "owl"]
    assert [row.mean_rank for row in table.rows] == [7 / 4, 7 / 4, 10 / 4]
    assert [row.top_share for row in table.rows] == [1 / 2, 1 / 4, 1 / 4]
    assert [row.mean_score for row in table.rows] == [3.0, 1.5, 1.0]
    assert table.to_markdown(limit=2).splitlines() == [
        "| group | mean score | top for | mean rank |",
        "| ----- | ---------: | ------: | --------: |",
        "| cat   |          3 |  50.0 % |      1.75 |",
        "| dog   |        1.5 |  25.0 % |      1.75 |",
        "",
        "Over 4 queries; the first 2 of 3 groups.",
    ]


def test_ranking_csv(tmp_path: Path) -> None:
    ranking(["a\nb", "c"], [[1.0, 3.0]]).to_csv(tmp_path / "ranking.csv")
    text = (tmp_path / "ranking.csv").read_bytes().decode()
    assert text == 'group,mean_score,top_share,mean_rank\nc,3.0,1.0,1.0\n"a\nb",1.0,0.0,2.0\n'


def test_ranking_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="ranking: groups must have one name for each of 2, got 1 names"):
        ranking(["a"], [[1.0, 2.0]])
    with pytest.raises(TypeError, match="ranking: groups must be a sequence of strings, got 'ab'"):
        ranking("ab", [[1.0, 2.0]])
    with pytest.raises(TypeError, match=r"ranking: groups must be a sequence of strings, got 1 \(int\) in it"):
        ranking(["a", 1], [[1.0, 2.0]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        ranking(["a", "b"], [[1.0, 2.0]]).to_markdown(limit=0)


@pytest.fixture
def seeds() -> list[Array]:
    """Three seeds of an oracle."""
    rng = np.random.default_rng(11)
    truth = rng.normal(size=(40, 6))
    return [truth + 0.5 * rng.normal(size=truth.shape) for _ in range(3)]


def values_of(table: AgreementTable, method: str) -> dict[str, float]:
    return {row.metric: row.mean for row in table.rows if row.method == method}


def test_the_floor_is_each_seed_against_the_mean_of_the_others(seeds: list[Array], pair: tuple[Array, Array]) -> None:
    others = [(seeds[1] + seeds[2]) / 2, (seeds[0] + seeds[2]) / 2, (seeds[0] + seeds[1]) / 2]
    table = agreement({"GUDA": pair[0]}, seeds[0], others=seeds[1:], metrics=["MRR", "Spearman"])
    for name, metric in (("MRR", mrr), ("Spearman", spearman)):
        floor = np.mean([metric(s, g) for s, g in zip(seeds, others, strict=True)])
        method = np.mean([metric(pair[0], g) for g in others])
        # Means of 40 values of up to 1 in another order of additions.
        assert values_of(table, "oracle, other seed")[name] == pytest.approx(floor, abs=120 * 2.0**-53)
        assert values_of(table, "GUDA")[name] == pytest.approx(method, abs=120 * 2.0**-53)
    assert [row.method for row in table.rows] == ["GUDA"] * 2 + ["oracle, other seed"] * 2 + ["random"] * 2


def test_two_seeds_are_compared_with_each_other(seeds: list[Array]) -> None:
    table = agreement({"second": seeds[1]}, seeds[0], others=seeds[1:2], metrics=["top-1"])
    same = top_1_agreement(seeds[0], seeds[1])
    assert values_of(table, "oracle, other seed")["top-1"] == same.mean()
    # The method is the second seed: against the first it agrees as the floor does, against the second fully.
    assert values_of(table, "second")["top-1"] == pytest.approx((same.mean() + 1) / 2, abs=2.0**-50)


def test_gaps_are_differences_query_by_query(seeds: list[Array], pair: tuple[Array, Array]) -> None:
    table = agreement({"GUDA": pair[0]}, seeds[0], others=seeds[1:2], metrics=["MRR"], seed=2)
    method = (mrr(pair[0], seeds[0]) + mrr(pair[0], seeds[1])) / 2
    floor = (mrr(seeds[0], seeds[1]) + mrr(seeds[1], seeds[0])) / 2
    (gap,) = table.gaps
    assert (gap.method, gap.metric) == ("GUDA", "MRR")
    assert (gap.mean, gap.low, gap.high) == pytest.approx(bootstrap_mean(method - floor, seed=2)[:3], abs=2.0**-48)
    # The oracle's first seed as a method: half of the time it is compared with itself.
    (gap,) = agreement({"first": seeds[0]}, seeds[0], others=seeds[1:2], metrics=["top-1"]).gaps
    assert gap.mean == pytest.approx((1 - top_1_agreement(*seeds[:2]).mean()) / 2, abs=2.0**-48)
    assert agreement(pair[0], seeds[0], metrics=["MRR"]).gaps == ()


def test_methods_may_be_compared_with_the_mean_of_all_seeds(seeds: list[Array], pair: tuple[Array, Array]) -> None:
    mean = np.mean(seeds, axis=0)
    table = agreement({"GUDA": pair[0]}, seeds[0], others=seeds[1:], reference="mean", metrics=["MRR"])
    alone = agreement({"GUDA": pair[0]}, mean, metrics=["MRR"])
    assert values_of(table, "GUDA") == values_of(alone, "GUDA")
    assert values_of(table, "random") == values_of(alone, "random")
    held_out = agreement({"GUDA": pair[0]}, seeds[0], others=seeds[1:], metrics=["MRR"])
    assert values_of(table, "oracle, other seed") == values_of(held_out, "oracle, other seed")


def test_a_constant_row_of_one_seed_is_missing(seeds: list[Array]) -> None:
    seeds[1][3] = 2.0
    rows = agreement({"first": seeds[0]}, seeds[0], others=seeds[1:2], metrics=["Spearman"]).rows
    assert [(row.method, row.queries, row.missing) for row in rows] == [
        ("first", 39, 1),
        ("oracle, other seed", 39, 1),
        ("random", 39, 1),
    ]


def test_bad_seeds(seeds: list[Array], pair: tuple[Array, Array]) -> None:
    with pytest.raises(
        ValueError, match=r"agreement: others\[1\] must have shape \(40, 6\) as oracle, got .*\(39, 6\)"
    ):
        agreement(pair[0], seeds[0], others=[seeds[1], seeds[2][1:]])
    with pytest.raises(ValueError, match="agreement: reference must be one of 'leave-one-out', 'mean', got 'all'"):
        agreement(pair[0], seeds[0], others=seeds[1:], reference="all")
    with pytest.raises(ValueError, match="a method must have a name other than 'random' and 'oracle, other seed'"):
        agreement({"oracle, other seed": pair[0]}, seeds[0])


def test_wide_markdown(seeds: list[Array]) -> None:
    seeds[0][0] = 0.0
    table = agreement({"a|b": seeds[1]}, seeds[0], metrics=["top-1", "Spearman"], resamples=100)
    lines = table.to_wide_markdown().splitlines()
    assert len({len(line) for line in lines[:-2]}) == 1
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[:-2]]
    assert cells[0] == ["method", "top-1", "Spearman"] and [row[0] for row in cells[2:]] == [r"a\|b", "random"]
    first = table.rows[0]
    assert cells[2][1] == f"{first.mean:.3f} [{first.low:.3f}, {first.high:.3f}]"
    assert lines[-1].endswith("40 queries, of which some means miss up to 1.")


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("leave-one-out", "compares each of 3 seeds with the mean of the other 2, as do all rows."),
        ("mean", "compares each of 3 seeds with the mean of the other 2, the other rows with the mean of all."),
    ],
)
def test_markdown_says_what_was_compared_with_what(seeds: list[Array], reference: str, said: str) -> None:
    table = agreement(seeds[0], seeds[0], others=seeds[1:], reference=reference, metrics=["MRR"], resamples=10)
    assert f"oracle, other seed {said}" in table.to_markdown()


def test_gaps_are_formed_with_leave_one_out_references_always(seeds: list[Array], pair: tuple[Array, Array]) -> None:
    options: dict[str, Any] = {"others": seeds[1:], "metrics": ["MRR", "Spearman"], "resamples": 100}
    mean = agreement({"GUDA": pair[0]}, seeds[0], reference="mean", **options)
    held_out = agreement({"GUDA": pair[0]}, seeds[0], **options)
    assert mean.rows != held_out.rows and mean.gaps == held_out.gaps
