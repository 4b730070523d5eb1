"""Confusion of top groups, significance, and the whole report."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from guda_fast.evaluation import Options, Subsets, confusion, evaluate, lds, significance
from guda_fast.evaluation.confusion import write_confusions
from guda_fast.evaluation.report import AGREEMENT, CONFUSION, FIGURE, GAPS, REPORT, SIGNIFICANCE
from test_p_values import result_of


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.random.default_rng(6).integers(0, 3, size=(2, 50, 4)).astype(float))  # many ties


def test_counts_are_the_plain_loop(pair) -> None:
    expected = np.zeros((4, 4), dtype=int)
    for s, g in zip(*pair, strict=True):
        expected[list(g).index(max(g)), list(s).index(max(s))] += 1
    found = confusion(["a", "b", "c", "d"], *pair)
    np.testing.assert_array_equal(found.counts, expected)
    assert found.counts.sum() == 50


def test_the_matrix_has_the_oracle_as_rows() -> None:
    s, g = np.eye(3)[[1, 1, 1, 0]], np.eye(3)[[0, 0, 1, 0]]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in confusion(["cat", "dog", "owl"], s, g).to_markdown().splitlines()
    ]
    assert lines[0] == ["oracle \\ method", "cat", "dog", "owl", "queries", "agreed"]
    assert lines[2:] == [
        ["cat", "1", "2", ".", "3", "33.3 %"],
        ["dog", ".", "1", ".", "1", "100.0 %"],
        ["owl", ".", ".", ".", "0", "-"],
    ]


def test_many_groups_are_shown_by_their_disagreements() -> None:
    s, g = np.eye(30)[[1, 1, 2, 5]], np.eye(30)[[0, 0, 3, 5]]
    text = confusion([f"g{k}" for k in range(30)], s, g).to_markdown(limit=20).splitlines()
    assert [line.split("|")[1:-1] for line in text[2:4]] == [
        [" g0           ", " g1           ", "       2 "],
        [" g3           ", " g2           ", "       1 "],
    ]
    assert text[4] == "The 2 most frequent disagreements."


def test_the_csv_has_a_row_a_pair_that_comes(pair, tmp_path: Path) -> None:
    found = confusion(["a", "b", "c", "d"], *pair)
    write_confusions(tmp_path / "c.csv", {"x, y": found, "z": found})
    with open(tmp_path / "c.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * np.count_nonzero(found.counts)
    again = np.zeros((4, 4), dtype=int)
    for row in rows:
        if row["method"] == "x, y":
            again["abcd".index(row["oracle_top"]), "abcd".index(row["method_top"])] = int(row["queries"])
    np.testing.assert_array_equal(again, found.counts)


def test_bad_confusions(pair) -> None:
    with pytest.raises(ValueError, match="confusion: groups must have one name for each of 4, got 1 names"):
        confusion(["a"], *pair)
    with pytest.raises(ValueError, match="confusion: oracle must have shape"):
        confusion(["a", "b", "c", "d"], pair[0], pair[1][1:])


def with_controls(count: int):
    scores = np.random.default_rng(count).normal(size=(30, 3 + count))
    names = [f"control-{index}" for index in range(count)]
    return result_of(scores, ["cat", "dog", "owl", *names]).with_p_values(names)


@pytest.mark.parametrize(("count", "expected"), [(19, 1 / 20), (18, 0.0), (39, 2 / 40), (99, 5 / 100), (9, 0.0)])
def test_significance_counts_p_values_up_to_the_level(count: int, expected: float) -> None:
    """0.05 itself is reached with 19 controls, however 1/20 rounds, and by no p with 18."""
    result = with_controls(count)
    (row,) = significance({"GUDA": result}).rows
    assert (row.controls, row.smallest) == (count, 1 / (1 + count))
    assert row.expected == pytest.approx(expected, rel=1e-15)
    reached = result.p_value <= 0.05 + 1e-9
    assert row.cells == reached.mean()
    assert row.top == reached[np.arange(30), result.scores.argmax(axis=1)].mean()


def test_significance_as_tables(tmp_path: Path) -> None:
    table = significance({"GUDA": with_controls(19)}, level=0.1)
    line = table.to_markdown().splitlines()[2]
    assert [cell.strip() for cell in line.split("|")[1:5]] == ["GUDA", "19", "0.05", "10.0 %"]
    table.to_csv(tmp_path / "s.csv")
    assert (tmp_path / "s.csv").read_text().splitlines()[0] == "method,controls,smallest,expected,cells,top"
    with pytest.raises(ValueError, match="significance: results must have p-values, got none for 'LOGO'"):
        significance({"LOGO": result_of(np.zeros((2, 2)), ["a", "b"])})
    with pytest.raises(ValueError, match="significance: level must be above 0 and below 1, got 1.0"):
        significance({}, level=1.0)


def test_the_report_has_every_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    g = rng.normal(size=(20, 4))
    s = g + rng.normal(size=g.shape)
    removed = np.eye(4, dtype=bool) | np.eye(4, k=1, dtype=bool)
    found = evaluate(
        ["a", "b", "c", "d"],
        {"GUDA": s},
        [g, g + 0.1 * rng.normal(size=g.shape)],
        options=Options(resamples=50),
        subsets=Subsets(g @ removed.T, removed),
        significance=significance({"GUDA": with_controls(19)}),
        notes=["A note."],
    )
    metrics = ["top-1", "top-3", "MRR", "NDCG@3", "RBO", "Spearman", "Kendall"]
    assert list(dict.fromkeys(row.metric for row in found.agreement.rows)) == metrics
    assert {row.method for row in found.agreement.rows} == {"GUDA", "oracle, other seed", "random"}
    assert [row.method for row in found.linear.rows] == ["GUDA", "the oracle"]
    assert found.linear.rows[0].mean == pytest.approx(lds(s, g @ removed.T, removed).mean(), rel=1e-14)
    found.write(tmp_path / "new" / "out")
    names = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert names == {REPORT, AGREEMENT, GAPS, CONFUSION, SIGNIFICANCE, FIGURE}
    text = (tmp_path / "new" / "out" / REPORT).read_text()
    for part in (
        "# Agreement with the oracle",
        "Linear datamodelling",
        "control groups",
        "Top groups of GUDA",
        "A note",
    ):
        assert part in text
    assert "own noise is not known" not in text
    assert "GUDA,LDS," in (tmp_path / "new" / "out" / AGREEMENT).read_text()


def test_a_report_of_one_oracle_says_that_its_noise_is_not_known(tmp_path: Path) -> None:
    g = np.random.default_rng(9).normal(size=(5, 2))
    found = evaluate(["a", "b"], {"GUDA": g}, [g], options=Options(resamples=10))
    assert {row.metric for row in found.agreement.rows} >= {"top-2", "NDCG@2"}
    for name in (GAPS, SIGNIFICANCE):
        (tmp_path / name).touch()  # of an earlier report
    found.write(tmp_path)
    assert "own noise is not known" in (tmp_path / REPORT).read_text()
    assert not (tmp_path / SIGNIFICANCE).exists() and not (tmp_path / GAPS).exists()


def test_a_query_that_was_scored_twice_counts_once() -> None:
    names = [f"control-{index}" for index in range(19)]
    scores = np.vstack([np.hstack([[9.0, 0.0], np.ones(19)]), np.hstack([[0.0, 0.5], np.ones(19)])])
    once = result_of(scores, ["cat", "dog", *names])
    twice = result_of(scores[[0, 0, 1]], ["cat", "dog", *names], query_ids=(10, 10, 11))
    tables = [significance({"GUDA": found.with_p_values(names)}) for found in (once, twice)]
    assert tables[0] == tables[1] and tables[0].rows[0].top == 0.5


def test_cells_that_were_not_considered_do_not_count() -> None:
    names = [f"control-{index}" for index in range(19)]
    scores = np.array([[np.nan, 0.5], [9.0, 0.0], [-1.0, np.nan]])
    found = result_of(np.hstack([scores, np.ones((3, 19))]), ["cat", "dog", *names]).with_p_values(names)
    (row,) = significance({"GUDA": found}).rows
    assert (row.cells, row.top) == (1 / 4, 1 / 3)


def test_the_report_says_what_its_intervals_do_not_hold() -> None:
    rng = np.random.default_rng(0)
    seeds = [rng.normal(size=(5, 3)) for _ in range(3)]
    methods = {"GUDA": rng.normal(size=(5, 3))}
    text = evaluate(["a", "b", "c"], methods, seeds, options=Options(resamples=10, confidence=0.9)).to_markdown()
    gaps = " ".join(text.split("## Less the oracle's own agreement")[1].split("## Top groups")[0].split())
    assert "one without 0 does not show that the method agrees less, or more" in gaps
    assert "each of 3 seeds with the mean of the other 2, as do all rows" in gaps and "90 %" in gaps
    assert "The tables below are of the mean of the oracle's 3 seeds, the first table of the seeds less one" in gaps
    options = Options(reference="mean", resamples=10)
    text = " ".join(evaluate(["a", "b", "c"], methods, seeds, options=options).to_markdown().split())
    gaps = text.split("## Less the oracle's own agreement")[1].split("## Top groups")[0]
    assert "as do all rows" in gaps and "The tables below are of the mean of the oracle's 3 seeds. " in gaps


def test_the_row_of_the_oracle_is_no_name_of_a_method() -> None:
    with pytest.raises(ValueError, match="evaluate: a method must have a name other than 'the oracle'"):
        evaluate(["a", "b"], {"the oracle": np.eye(2)}, [np.eye(2)])
