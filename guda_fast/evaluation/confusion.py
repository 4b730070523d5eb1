"""Which groups a method puts first where the oracle puts which: the confusion of top groups."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from guda_fast._files import atomic_write
from guda_fast.evaluation.metrics import IntArray, check_names, check_score_pair
from guda_fast.evaluation.table import markdown

_COLUMNS = ("method", "oracle_top", "method_top", "queries")


@dataclass(frozen=True, eq=False)
class Confusion:
    """How often each pair of top groups comes: ``counts[i, j]`` queries have the oracle's top i and the method's top j.

    groups: [K]. counts: [(K, K), int64].
    """

    groups: tuple[str, ...]
    counts: IntArray

    def to_markdown(self, limit: int = 20) -> str:
        """A matrix with the oracle's top groups as rows, or above ``limit`` groups the most frequent disagreements."""
        if len(self.groups) > limit:
            return self._disagreements(limit)
        header = ["oracle \\ method", *self.groups, "queries", "agreed"]
        cells = []
        for group, row, same in zip(self.groups, self.counts, self.counts.diagonal(), strict=True):
            total = int(row.sum())
            shown = [str(count) if count else "." for count in row]
            cells.append([group, *shown, str(total), f"{100 * same / total:.1f} %" if total else "-"])
        return markdown(header, cells, text_columns=1)

    def _disagreements(self, limit: int) -> str:
        other = self.counts * ~np.eye(len(self.groups), dtype=bool)
        order = np.argsort(-other, axis=None, kind="stable")[:limit]
        pairs = [divmod(int(cell), len(self.groups)) for cell in order if other.flat[cell]]
        cells = [[self.groups[i], self.groups[j], str(other[i, j])] for i, j in pairs]
        table = markdown(["oracle's top", "method's top", "queries"], cells, text_columns=2)
        return f"{table}The {len(cells)} most frequent disagreements.\n"


def confusion(groups: Sequence[str], scores: ArrayLike, oracle: ArrayLike) -> Confusion:
    """Count the pairs of top groups over queries; among equal scores the lower group is the top.

    groups: names [K]
    scores: the method's scores [(N, K), real and finite, K >= 2]
    oracle: the oracle's scores [(N, K), real and finite]
    Returns: the ``Confusion``
    Raises: TypeError, ValueError for other arguments

    >>> confusion(["cat", "dog"], [[2.0, 1.0], [1.0, 2.0]], [[2.0, 1.0], [2.0, 1.0]]).counts
    array([[1, 1],
           [0, 0]])
    """
    s, g = check_score_pair("confusion", scores, oracle)
    names = check_names("confusion", "groups", groups, s.shape[1])
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (g.argmax(axis=1), s.argmax(axis=1)), 1)
    return Confusion(names, counts)


def write_confusions(path: str | os.PathLike[str], confusions: Mapping[str, Confusion]) -> None:
    """Write a CSV with a row for each pair of top groups that comes, by method; all of it or nothing."""
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for method, found in confusions.items():
            for i, j in np.argwhere(found.counts):
                writer.writerow([method, found.groups[i], found.groups[j], int(found.counts[i, j])])
