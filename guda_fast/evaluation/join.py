"""Joining results: the scores of methods and oracle as matrices of the same queries and groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from guda_fast.evaluation.metrics import FloatArray, check_scores
from guda_fast.results import Attribution

_RECORDED = {"base_hash": "base", "protocol": "protocol"}
_SHOWN = 3


@dataclass(frozen=True, eq=False)
class Joined:
    """Results of the same queries and groups, side by side.

    queries: names of the distinct queries, as the first result has them [N]. query_ids: [N, 0..2^64-1].
    groups: in the order of the first result [K].
    scores: of each result, by its name [(N, K), float64, finite].
    notes: what other results were computed with otherwise than the first, one sentence each.
    """

    queries: tuple[str, ...]
    query_ids: tuple[int, ...]
    groups: tuple[str, ...]
    scores: Mapping[str, FloatArray]
    notes: tuple[str, ...]

    def rows_of(self, name: str, result: Attribution) -> list[int]:
        """The row in a result, of whatever groups, of each query, by name where no id is shared; ValueError naming the
        result and what is missing."""
        found = _distinct(name, result)
        named = _named_rows(result)
        if not found.keys() & set(self.query_ids) and named is not None and set(self.queries) <= named.keys():
            return [named[query] for query in self.queries]
        missing = [query for query, number in zip(self.queries, self.query_ids, strict=True) if number not in found]
        if missing:
            raise ValueError(f"{name}: must have every query that is compared, found {_some(missing)} missing")
        return [found[number] for number in self.query_ids]


def join(results: Mapping[str, Attribution]) -> Joined:
    """Join results by query id and group name; a query that comes several times is one.

    The id of a query holds its condition, so the same image has other ids under a conditional model and under an
    unconditional one. A result that shares no id with the first is joined by the names of the queries where these are
    distinct and the same, which ``notes`` say; not where both are known to have no condition, whose images differ.

    results: by the names that messages call them, at least one; the first is what the others must match
    Estimates (of a race) are compared as they are, which ``notes`` say: they are made to tell the top groups.
    Raises ValueError naming the result and what is missing where, not finite, or there twice with different scores: all
    metrics but the top groups compare whole rows, so results without some of their cells are refused.

    >>> join({"LOGO": logo, "GUDA": guda}).scores["GUDA"].shape  # doctest: +SKIP
    (256, 10)
    """
    if not results:
        raise ValueError("join: results must hold at least one result, got an empty mapping")
    first, *_ = results
    reference = results[first]
    rows = {name: _distinct(name, result) for name, result in results.items()}
    wanted = dict(zip(reference.query_ids, reference.queries, strict=True))
    scores, notes = {}, []
    for name, result in results.items():
        _check_same(name, "groups", {g: g for g in result.groups}, first, {g: g for g in reference.groups})
        named = _same_names(result, reference)
        if named is None:
            _check_same(name, "queries", dict(zip(result.query_ids, result.queries, strict=True)), first, wanted)
            picked = [rows[name][number] for number in rows[first]]
        else:
            picked = [named[reference.queries[row]] for row in rows[first].values()]
            notes.append(
                f"{name} has no query id in common with {first}, as when one of them is of a conditional model: joined "
                "by the names of the queries, which do not tell whether the images are the same."
            )
        columns = [result.groups.index(group) for group in reference.groups]
        scores[name] = result.scores[np.ix_(picked, columns)]
        notes += [*_differences(name, result, first, reference), *_estimates(name, result)]
    return Joined(
        queries=tuple(reference.queries[row] for row in rows[first].values()),
        query_ids=tuple(rows[first]),
        groups=reference.groups,
        scores=scores,
        notes=tuple(notes),
    )


def _distinct(name: str, result: Attribution) -> dict[int, int]:
    """The first row of each query id."""
    _check_complete(name, result)
    try:
        check_scores("join", "scores", result.scores)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    found: dict[int, int] = {}
    for row, number in enumerate(result.query_ids):
        known = found.setdefault(number, row)
        if not np.array_equal(result.scores[known], result.scores[row]):
            raise ValueError(
                f"{name}: must have one score for a query, found others for {result.queries[row]} than for "
                f"{result.queries[known]}, which has the same id"
            )
    return found


def _check_complete(name: str, result: Attribution) -> None:
    """Raise ValueError where a cell was not considered, as with candidates or a tree."""
    missing = np.argwhere(~result.considered)
    if len(missing):
        row, column = missing[0]
        more = f" (and {len(missing) - 1} more cells)" if len(missing) > 1 else ""
        raise ValueError(
            f"{name}: must have a score of every query under every group, as metrics compare whole rows, found none of "
            f"{result.queries[row]} under {result.groups[column]}{more}"
        )


def _same_names(result: Attribution, reference: Attribution) -> dict[str, int] | None:
    """The row of each name, where two results share no query id but all names, and either may be conditional."""
    conditions = [found.provenance.get("conditions") for found in (result, reference)]
    if all(isinstance(found, Mapping) and not found.get("names") for found in conditions):
        return None
    rows, others = _named_rows(result), _named_rows(reference)
    if (
        rows is None
        or others is None
        or rows.keys() != others.keys()
        or set(result.query_ids) & set(reference.query_ids)
    ):
        return None
    return rows


def _named_rows(result: Attribution) -> dict[str, int] | None:
    """The row of each name; None where names are not distinct."""
    rows = {name: row for row, name in enumerate(result.queries)}
    return rows if len(rows) == len(result.queries) else None


def _check_same(name: str, what: str, found: Mapping[Any, str], first: str, wanted: Mapping[Any, str]) -> None:
    """Raise ValueError where two results have other queries or groups; found, wanted: their names by key."""
    missing = [wanted[key] for key in wanted if key not in found]
    further = [found[key] for key in found if key not in wanted]
    if missing or further:
        parts = [f"found {_some(missing)} missing"] if missing else []
        parts += [f"found {_some(further)} besides"] if further else []
        raise ValueError(f"{name}: must have the {what} of {first}, {' and '.join(parts)}")


def _some(names: Sequence[str]) -> str:
    more = f" (and {len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _differences(name: str, result: Attribution, first: str, reference: Attribution) -> list[str]:
    """Rankings compare across bases and protocols, but a reader must know of it."""
    pairs = {word: (result.provenance.get(key), reference.provenance.get(key)) for key, word in _RECORDED.items()}
    return [
        f"{name} has another {word} than {first}."
        for word, (found, wanted) in pairs.items()
        if None not in (found, wanted) and found != wanted
    ]


def _estimates(name: str, result: Attribution) -> list[str]:
    """A race ends where the top groups are decided: the order of the others is that of estimates with large errors."""
    share = float(result.estimated.mean())
    if share == 0:
        return []
    note = (
        f"{100 * share:.3g} % of the scores of {name} are estimates, made to tell each query's top groups: metrics of "
        "the whole order include their errors."
    )
    return [note]
