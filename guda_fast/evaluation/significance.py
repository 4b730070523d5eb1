"""How many scores stand out from those of control groups."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from guda_fast._validate import check_real
from guda_fast.evaluation.table import markdown, write_csv
from guda_fast.results import Attribution


@dataclass(frozen=True)
class SignificanceRow:
    """What the p-values of one method say; see ``significance``."""

    method: str
    controls: int
    smallest: float
    expected: float
    cells: float
    top: float


@dataclass(frozen=True)
class SignificanceTable:
    """The p-values of methods: ``rows``, and the ``level`` that they were held against."""

    rows: tuple[SignificanceRow, ...]
    level: float

    def to_markdown(self) -> str:
        """The table as aligned Markdown, and a line that explains it."""
        header = ["method", "controls", "smallest p", "under the null", "all scores", "top groups"]
        cells = [
            [
                row.method,
                str(row.controls),
                f"{row.smallest:.3g}",
                *(_percent(x) for x in (row.expected, row.cells, row.top)),
            ]
            for row in self.rows
        ]
        note = (
            f"Share of p-values at most {self.level:g}: what the null alone gives, of all scores, and of each query's "
            "top group, which is the largest of many and so exceeds the second column under the null too."
        )
        return f"{markdown(header, cells, text_columns=1)}\n{note}\n"

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to ``path`` with all digits; all of it or nothing."""
        write_csv(path, SignificanceRow, self.rows)


def significance(results: Mapping[str, Attribution], level: float = 0.05) -> SignificanceTable:
    """Hold the p-values of results against a level.

    With M controls p is a multiple of 1 / (1 + M), so under the null a share floor(level (1 + M)) / (1 + M) of scores
    has p <= level: none where 1 / (1 + M) is above the level. A query that was scored several times counts once,
    and a cell that was not considered not at all.

    results: by method, each with p-values (``Attribution.with_p_values``)
    level: of the test [above 0, below 1]
    Returns: the ``SignificanceTable``, with a row a method
    Raises: TypeError, ValueError for other arguments
    """
    level = check_real("significance", "level", level, 0.0, 1.0)
    if not 0 < level < 1:
        raise ValueError(f"significance: level must be above 0 and below 1, got {level!r}")
    rows = []
    for method, result in results.items():
        if result.p_value is None:
            raise ValueError(f"significance: results must have p-values, got none for {method!r}")
        count = len(result.provenance["controls"])
        distinct = np.unique(np.array(result.query_ids, dtype=np.uint64), return_index=True)[1]
        p_value, there = result.p_value[distinct], result.considered[distinct]
        best = np.where(there, result.scores[distinct], -np.inf).argmax(axis=1)
        top = np.take_along_axis(p_value, best[:, None], axis=1)[there.any(axis=1)]
        # p is a quotient of integers and so is compared as one: 0.05 (1 + 19) is 1 but for its rounding.
        allowed = np.floor(level * (1 + count) * (1 + 2.0**-50))
        reached = [float((np.rint(p * (1 + count)) <= allowed).mean()) for p in (p_value[there], top)]
        rows.append(SignificanceRow(method, count, 1 / (1 + count), float(allowed) / (1 + count), *reached))
    return SignificanceTable(tuple(rows), level)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
