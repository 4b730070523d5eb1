"""Tables: agreement of methods with an oracle, and which groups the scores rank high."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from guda_fast._files import atomic_write
from guda_fast._validate import check_choice, check_int, describe
from guda_fast.evaluation import metrics as m
from guda_fast.evaluation.bootstrap import bootstrap_mean, check_confidence

RANDOM = "random"
FLOOR = "oracle, other seed"
REFERENCES = ("leave-one-out", "mean")
# Random rankings drawn for the expected values: one a query at least, and up to this many, while all of them
# hold no more than so many scores (16 MiB).
_RANDOM_RANKINGS = 10_000
_RANDOM_SCORES = 2**21

_Metric = Callable[[m.FloatArray, m.FloatArray], m.FloatArray]


@dataclass(frozen=True)
class AgreementRow:
    """One method's mean of one metric over queries, with its interval; see ``agreement``."""

    method: str
    metric: str
    mean: float
    low: float
    high: float
    queries: int
    missing: int


@dataclass(frozen=True)
class AgreementTable:
    """Agreement of methods with an oracle: ``rows``, the ``confidence`` of their intervals, how many training ``seeds``
    the oracle has, which of them make the ``reference``, and ``gaps``, the methods' differences from the oracle's own
    noise; see ``agreement``."""

    rows: tuple[AgreementRow, ...]
    confidence: float
    seeds: int = 1
    reference: str = REFERENCES[0]
    gaps: tuple[AgreementRow, ...] = ()

    def to_markdown(self) -> str:
        """The rows as aligned Markdown, means with three decimals, and a line that explains them."""
        header = [field.name for field in fields(AgreementRow)]
        cells = []
        for row in self.rows:
            numbers = [_three_decimals(value) for value in (row.mean, row.low, row.high)]
            cells.append([row.method, row.metric, *numbers, str(row.queries), str(row.missing)])
        return f"{markdown(header, cells, text_columns=2)}\n{self._note('low and high end')}\n"

    def to_wide_markdown(self) -> str:
        """The same with a line a method and a column a metric: the mean, and its interval in brackets."""
        metrics = list(dict.fromkeys(row.metric for row in self.rows))
        found = {(row.method, row.metric): row for row in self.rows}
        cells = []
        for method in dict.fromkeys(row.method for row in self.rows):
            rows = [found.get((method, metric)) for metric in metrics]
            cells.append([method, *("" if row is None else _with_interval(row) for row in rows)])
        note = self._note("brackets hold")
        fewest, most = min(row.queries for row in self.rows), max(row.queries + row.missing for row in self.rows)
        note += f" {most} {'query' if most == 1 else 'queries'}"
        note += f", of which some means miss up to {most - fewest}." if fewest < most else "."
        return f"{markdown(['method', *metrics], cells, text_columns=1)}\n{note}\n"

    def _note(self, interval: str) -> str:
        note = f"Mean over queries; {interval} the {100 * self.confidence:g} % bootstrap interval over queries."
        note += " What other training seeds would change is not in it."
        if any(row.method == RANDOM for row in self.rows):
            note += f" For {RANDOM} they are where the mean of random rankings of as many queries falls."
        if self.seeds > 1:
            rest = "the other" if self.seeds == 2 else f"the mean of the other {self.seeds - 1}"
            every = "as do all rows" if self.reference == REFERENCES[0] else "the other rows with the mean of all"
            note += f" {FLOOR} compares each of {self.seeds} seeds with {rest}, {every}."
        return note

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to ``path`` with all digits, missing values as ``nan``; all of it or nothing."""
        write_csv(path, AgreementRow, self.rows)


@dataclass(frozen=True)
class RankingRow:
    """How one group stands over all queries; see ``ranking``."""

    group: str
    mean_score: float
    top_share: float
    mean_rank: float


@dataclass(frozen=True)
class RankingTable:
    """How the groups stand over all queries: ``rows`` by rising mean rank, the number of ``queries``."""

    rows: tuple[RankingRow, ...]
    queries: int

    def to_markdown(self, limit: int | None = None) -> str:
        """The table as aligned Markdown.

        limit: show the first groups only [None: all; at least 1]
        """
        if limit is not None:
            limit = check_int("RankingTable.to_markdown", "limit", limit, 1)
        shown = self.rows[:limit]
        header = ["group", "mean score", "top for", "mean rank"]
        cells = [
            [row.group, f"{row.mean_score:.4g}", f"{100 * row.top_share:.1f} %", f"{row.mean_rank:.2f}"]
            for row in shown
        ]
        note = f"Over {self.queries} {'query' if self.queries == 1 else 'queries'}"
        if len(shown) < len(self.rows):
            note += f"; the first {len(shown)} of {len(self.rows)} groups"
        return f"{markdown(header, cells, text_columns=1)}\n{note}.\n"

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to ``path`` with all digits; all of it or nothing."""
        write_csv(path, RankingRow, self.rows)


def agreement(
    scores: ArrayLike | Mapping[str, ArrayLike],
    oracle: ArrayLike,
    *,
    others: Sequence[ArrayLike] = (),
    reference: str = "leave-one-out",
    metrics: Sequence[str] | None = None,
    gain: str = "exponential",
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> AgreementTable:
    """Compare score matrices with an oracle's: mean of each metric over queries, with a bootstrap interval.

    A method ``random`` is added: the expected values of uniformly random rankings, from a seeded draw, and
    the range in which the mean over as many queries falls.

    With S seeds of the oracle a row ``oracle, other seed`` is added, its own noise: each seed against the mean of the
    other S - 1, a query's values averaged over the seeds. Methods are compared with the same S references and averaged
    alike, so that they may be read against that row, or with the mean of all S, which is less noisy than what the
    row's own seeds are compared with. ``gaps`` are the means over queries of a method's value less that row's, both
    with the S references that leave a seed out, whatever ``reference`` is: others would favour the method.

    All intervals resample queries. The models of a seed are shared by all queries, so what another training seed would
    change is in none of them, and a gap's interval without zero is no test of whether a method falls short.

    scores: the method's scores [(N, K), real and finite, N >= 1, K >= 2], or several by method name
    oracle: the oracle's scores [(N, K), real and finite]
    others: its scores with other training seeds [S - 1 of (N, K), real and finite]
    reference: what methods are compared with where there are others, "leave-one-out" or "mean"
    metrics: of "top-k", "NDCG@k" with 1 <= k <= K, "MRR", "RBO", "Spearman", "Kendall"
        [None: top-1, MRR, NDCG@3 (NDCG@2 when K is 2), Spearman]
    gain: of every NDCG, "exponential" or "linear"; a linear one says so in the metric's name
    seed: of the bootstrap and the random rankings [0 to 2^64 - 1]
    confidence: coverage of the intervals [above 0, below 1]
    resamples: bootstrap samples [at least 1]
    Returns: the ``AgreementTable``, methods in the given order, metrics within them
    Raises: TypeError, ValueError for other arguments

    >>> table = agreement([[3.0, 2.0, 1.0]], [[6.0, 5.0, 4.0]], metrics=["MRR"])
    >>> table.rows[0]
    AgreementRow(method='scores', metric='MRR', mean=1.0, low=1.0, high=1.0, queries=1, missing=0)
    """
    seeds = _check_seeds(oracle, others)
    methods = _check_methods(scores, seeds[0])
    check_choice("agreement", "reference", reference, REFERENCES)
    measures = _metrics(metrics, gain, seeds[0].shape[1])
    held_out = _leave_one_out(seeds)
    references = held_out if reference == "leave-one-out" else [np.mean(seeds, axis=0)]
    row = _row_maker("agreement", confidence, resamples, seed)
    values = _values(methods, measures, references)
    rows = [row(*key, found) for key, found in values.items()]
    gaps: list[AgreementRow] = []
    if others:
        floor = {metric: _mean_of(measure, seeds, held_out) for metric, measure in measures.items()}
        rows += [row(FLOOR, metric, found) for metric, found in floor.items()]
        if references is not held_out:
            values = _values(methods, measures, held_out)
        gaps += [row(method, metric, found - floor[metric]) for (method, metric), found in values.items()]
    rows += [row(RANDOM, metric, *_random_values(measure, references, seed)) for metric, measure in measures.items()]
    return AgreementTable(tuple(rows), confidence, len(seeds), reference, tuple(gaps))


def linear_agreement(
    scores: Mapping[str, ArrayLike],
    outcomes: ArrayLike,
    removed: ArrayLike,
    *,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> AgreementTable:
    """The ``lds`` of methods: its mean over queries, with a bootstrap interval; random scores have mean zero.

    scores: of each method [(N, K), real and finite, N >= 1, K >= 2]
    outcomes, removed: of the models retrained without several groups, as for ``lds``
    seed, confidence, resamples: as for ``agreement``
    Returns: the ``AgreementTable``, with a row a method
    Raises: TypeError, ValueError for other arguments

    >>> linear_agreement({"sum": [[3.0, 1.0]]}, [[3.0, 1.0]], [[True, False], [False, True]]).rows[0].mean
    1.0
    """
    row = _row_maker("linear_agreement", confidence, resamples, seed)
    rows = [row(method, "LDS", m.lds(matrix, outcomes, removed)) for method, matrix in scores.items()]
    return AgreementTable(tuple(rows), confidence)


def ranking(groups: Sequence[str], scores: ArrayLike) -> RankingTable:
    """Summarise a score matrix by group: mean score, share of queries where it is top, mean rank.

    groups: the groups' names [K]
    scores: the scores [(N, K), real and finite, N >= 1, K >= 2]; among equal ones the lower group is first
    Returns: the ``RankingTable``, best mean rank first
    Raises: TypeError, ValueError for other arguments

    >>> print(ranking(["cat", "dog"], [[1.0, 3.0], [2.0, 4.0]]).to_markdown().splitlines()[2])
    | dog   |        3.5 | 100.0 % |      1.00 |
    """
    matrix = _check_rows("ranking", "scores", scores)
    names = m.check_names("ranking", "groups", groups, matrix.shape[1])
    ranks = m.descending_ranks(matrix)
    rows = [
        RankingRow(name, *(float(value) for value in values))
        for name, *values in zip(names, matrix.mean(axis=0), (ranks == 1).mean(axis=0), ranks.mean(axis=0), strict=True)
    ]
    return RankingTable(tuple(sorted(rows, key=lambda row: row.mean_rank)), len(matrix))


def _row_maker(where: str, confidence: float, resamples: int, seed: int) -> Callable[..., AgreementRow]:
    """Makes a row of a method, a metric and its values, of which every query may have several draws."""
    check_confidence(where, confidence)
    check_int(where, "seed", seed, 0, 2**64 - 1)
    check_int(where, "resamples", resamples, 1)

    def row(method: str, metric: str, values: m.FloatArray, draws: int = 1) -> AgreementRow:
        present = int((~np.isnan(values)).sum()) // draws
        interval = bootstrap_mean(
            values,
            confidence=confidence,
            resamples=resamples,
            seed=seed,
            sample_size=max(1, present),
        )
        counts = (present, len(values) // draws - present)
        return AgreementRow(method, metric, *interval[:3], *counts)

    return row


def _check_methods(scores: ArrayLike | Mapping[str, ArrayLike], oracle: m.FloatArray) -> dict[str, m.FloatArray]:
    given: Mapping[str, Any] = scores if isinstance(scores, Mapping) else {"scores": scores}
    if not given:
        raise ValueError("agreement: scores must have at least one method, got an empty mapping")
    methods = {}
    for method, matrix in given.items():
        if not isinstance(method, str):
            raise TypeError(f"agreement: scores must have method names as keys, got {describe(method)}")
        if not method or method in (RANDOM, FLOOR):
            raise ValueError(
                f"agreement: a method must have a name other than {RANDOM!r} and {FLOOR!r}, got {method!r}"
            )
        methods[method] = m.check_score_pair("agreement", matrix, oracle)[0]
    return methods


def _check_seeds(oracle: ArrayLike, others: Sequence[ArrayLike]) -> list[m.FloatArray]:
    first = _check_rows("agreement", "oracle", oracle)
    seeds = [first]
    for index, other in enumerate(others):
        seeds.append(_check_rows("agreement", f"others[{index}]", other))
        if seeds[-1].shape != first.shape:
            raise ValueError(
                f"agreement: others[{index}] must have shape {first.shape} as oracle, got shape {seeds[-1].shape}"
            )
    return seeds


def _leave_one_out(seeds: Sequence[m.FloatArray]) -> list[m.FloatArray]:
    """For each seed the mean of the others; a single one itself."""
    if len(seeds) == 1:
        return list(seeds)
    return [np.mean([other for j, other in enumerate(seeds) if j != i], axis=0) for i in range(len(seeds))]


def _values(
    methods: Mapping[str, m.FloatArray], measures: Mapping[str, _Metric], references: Sequence[m.FloatArray]
) -> dict[tuple[str, str], m.FloatArray]:
    """Each method's metrics of every query, averaged over the references."""
    return {
        (method, metric): _mean_of(measure, [matrix] * len(references), references)
        for method, matrix in methods.items()
        for metric, measure in measures.items()
    }


def _mean_of(measure: _Metric, scores: Sequence[m.FloatArray], oracles: Sequence[m.FloatArray]) -> m.FloatArray:
    """The metric of every query, averaged over pairs of scores and oracle; missing where one is."""
    values: m.FloatArray = np.mean([measure(s, g) for s, g in zip(scores, oracles, strict=True)], axis=0)
    return values


def _check_rows(where: str, name: str, value: ArrayLike) -> m.FloatArray:
    matrix = m.check_scores(where, name, value)
    if not len(matrix):
        raise ValueError(f"{where}: {name} must have at least one query, got shape {matrix.shape}")
    return matrix


def _metrics(names: Sequence[str] | None, gain: str, groups: int) -> dict[str, _Metric]:
    check_choice("agreement", "gain", gain, ("exponential", "linear"))
    if names is None:
        names = ("top-1", "MRR", f"NDCG@{min(3, groups)}", "Spearman")
    m.check_names("agreement", "metrics", names)
    if not names:
        raise ValueError("agreement: metrics must have at least one metric, got none")
    return dict(_metric(name, gain, groups) for name in names)


def _metric(name: str, gain: str, groups: int) -> tuple[str, _Metric]:
    plain = {"MRR": m.mrr, "RBO": m.rbo, "Spearman": m.spearman, "Kendall": m.kendall}
    if name in plain:
        return name, plain[name]
    match = re.fullmatch(r"(top-|NDCG@)([1-9][0-9]*)", name)
    if match is None:
        wanted = "'top-k', 'NDCG@k', " + ", ".join(repr(choice) for choice in plain)
        raise ValueError(f"agreement: metrics must be among {wanted}, got {describe(name)}")
    k = check_int("agreement", f"k in {name!r}", int(match[2]), 1, groups)
    if match[1] == "top-":
        return name, lambda s, g: m.top_k_overlap(s, g, k)
    label = name if gain == "exponential" else f"{name} (linear)"
    return label, lambda s, g: m.ndcg(s, g, k, gain)


def _random_values(measure: _Metric, oracles: Sequence[m.FloatArray], seed: int) -> tuple[m.FloatArray, int]:
    """The metric of every query at several random rankings [(draws * N,)], and how many draws."""
    count, size = len(oracles[0]), oracles[0].size
    draws = max(1, min(-(-_RANDOM_RANKINGS // count), _RANDOM_SCORES // size))
    repeated = [np.tile(oracle, (draws, 1)) for oracle in oracles]
    # Ranking independent uniform numbers is a uniformly random permutation.
    scores = np.random.default_rng(seed).random(repeated[0].shape)
    return _mean_of(measure, [scores] * len(oracles), repeated), draws


def _with_interval(row: AgreementRow) -> str:
    mean, low, high = (_three_decimals(value) for value in (row.mean, row.low, row.high))
    return mean if math.isnan(row.mean) else f"{mean} [{low}, {high}]"


def _three_decimals(value: float) -> str:
    # Adding zero makes a rounded negative zero positive.
    return "missing" if math.isnan(value) else f"{round(value, 3) + 0.0:.3f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int) -> str:
    """Markdown with padded columns, the first ``text_columns`` left-aligned, the others right-aligned."""
    cells = [[re.sub(r"\s+", " ", cell).replace("|", r"\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |\n"

    rule = ["-" * width if column < text_columns else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return line(cells[0]) + line(rule) + "".join(line(row) for row in cells[1:])


def write_csv(path: str | os.PathLike[str], kind: type[Any], rows: Sequence[Any]) -> None:
    """Write rows of one dataclass with all digits, under its fields' names; all of it or nothing."""
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(kind)])
        writer.writerows(astuple(row) for row in rows)
