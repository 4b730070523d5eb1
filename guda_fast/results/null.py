"""Scores against those of control groups: the null distribution of a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from guda_fast._validate import describe
from guda_fast.diffusion.schedule import FloatArray

if TYPE_CHECKING:
    from guda_fast.results.attribution import Attribution


def p_values(result: Attribution, controls: Attribution, rows: Sequence[int]) -> FloatArray:
    """How often the controls' scores of a query reach that of each group; see ``Attribution.p_values``.

    rows: of the controls' scores, for each query of the result [N]
    """
    scores, null = result.scores, controls.scores[rows]
    for what, values in (("scores", scores), ("controls", null)):
        if values.shape[1] == 0:
            raise ValueError(f"p_values: {what} must be of at least one group, got none")
    if np.isinf(scores).any():
        raise ValueError("p_values: scores must be finite, got infinity")
    if not np.isfinite(null).all():
        raise ValueError(
            "p_values: controls must be finite, got NaN, as of cells that were not considered, or infinity"
        )
    _check_no_estimates("scores", result)
    _check_no_estimates("controls", controls)
    count = null.shape[1]
    below = [np.searchsorted(row, cells, side="left") for row, cells in zip(np.sort(null), scores, strict=True)]
    p_value: FloatArray = (1.0 + count - np.reshape(below, scores.shape)) / (1.0 + count)
    return np.where(result.considered, p_value, np.nan)


def matched_rows(result: Attribution, controls: Attribution) -> list[int]:
    """The row of the controls' scores of each query of a result, after a look at what both were computed with."""
    _check_apart(result, controls)
    for key in ("base_hash", "protocol"):
        wanted, found = result.provenance.get(key), controls.provenance.get(key)
        if None not in (wanted, found) and wanted != found:
            raise ValueError(f"p_values: controls must have the same {key} as the scores, got {describe(found)}")
    rows = {number: row for row, number in enumerate(controls.query_ids)}
    missing = [name for name, number in zip(result.queries, result.query_ids, strict=True) if number not in rows]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"p_values: controls must have scores for every query, got none for {missing[0]}{more}")
    return [rows[number] for number in result.query_ids]


def columns_of(where: str, name: str, groups: Sequence[str], known: tuple[str, ...]) -> list[int]:
    """Where each of the groups is among the known ones."""
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise TypeError(f"{where}: {name} must be a sequence of group names, got {describe(groups)}")
    if len(set(groups)) != len(groups):
        raise ValueError(f"{where}: {name} must be distinct, got {describe(tuple(groups))}")
    for group in groups:
        if group not in known:
            raise ValueError(f"{where}: {name} must be among {', '.join(known)}, got {describe(group)}")
    return [known.index(group) for group in groups]


def _check_no_estimates(what: str, result: Attribution) -> None:
    """Raise ValueError at the first estimate: with errors of their own, groups and controls do not exchange."""
    found = np.argwhere(result.estimated)
    if len(found):
        row, column = found[0]
        raise ValueError(
            f"p_values: {what} must be exact, got an estimate of {describe(result.groups[column])} for "
            f"{result.queries[row]}; score them with the full estimator"
        )


def _check_apart(result: Attribution, controls: Attribution) -> None:
    """Raise ValueError where a control is one of the result's groups: a group is no null for itself or the others."""
    hashes = result.provenance.get("delta_hashes") or {}
    group_of = {number: group for group, number in hashes.items() if number is not None}
    found = controls.provenance.get("delta_hashes") or {}
    for name in controls.groups:
        if name in result.groups:
            raise ValueError(f"p_values: controls must not be groups of the scores, got {describe(name)}")
        if found.get(name) in group_of:
            same = describe(group_of[found[name]])
            raise ValueError(
                f"p_values: controls must not be groups of the scores, got {describe(name)}, which is {same}"
            )
