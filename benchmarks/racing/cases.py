"""What the curves are drawn for: recorded models, and what is spliced from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from benchmarks.racing import synthetic
from guda_fast.diffusion.schedule import FloatArray

CANDIDATES = 0.05  # of the groups
SIMILARITY_NOISE = (
    1.0  # standard deviations of a query's scores: it keeps the top group, whose race is what is measured
)


@dataclass(frozen=True, eq=False)
class Case:
    """Queries whose exact top group is known.

    differences: of all groups [(N, K, D), float64]; parents come first where there are any. candidates: cells to
    consider [(N, K), bool]; None: all. parent: of each group that is no parent [(K - P,), int64]; None: there is no
    tree. real: whether models were run for it.
    """

    name: str
    differences: FloatArray
    candidates: npt.NDArray[np.bool_] | None = None
    parent: npt.NDArray[np.int64] | None = None
    real: bool = False

    @property
    def parents(self) -> int:
        """How many of the groups are parents, the first ones."""
        return 0 if self.parent is None else int(self.parent.max()) + 1

    @cached_property
    def full(self) -> int:
        """Forwards of the full protocol over all groups that are no parents, with the base's."""
        queries, groups, draws = self.differences.shape
        return queries * draws * (groups - self.parents + 1)

    @cached_property
    def top(self) -> npt.NDArray[np.int64]:
        """The group with the largest sum over all draws among those that are no parents, whatever is considered."""
        return self.best(self.differences.sum(axis=2))

    def best(self, scores: FloatArray) -> npt.NDArray[np.int64]:
        """Of each query the highest of scores of groups that are no parents [(N, K), NaN where not considered]."""
        own = np.nan_to_num(scores[:, self.parents :], nan=-np.inf)
        found: npt.NDArray[np.int64] = own.argmax(axis=1) + self.parents
        return found


def spliced_cases(name: str, real: FloatArray, queries: int, groups: Sequence[int], *, seed: int) -> Iterator[Case]:
    """Many groups, as they are and with heavy tails; for the most groups also with candidates and with a tree."""
    for count in groups:
        for heavy in (False, True):
            made = synthetic.spliced(real, queries, count, heavy=heavy, seed=seed)
            yield Case(f"{name}, K={count}{', heavy tails' if heavy else ''}", made.differences)
    kept = synthetic.candidates(made.differences, round(CANDIDATES * count), SIMILARITY_NOISE, seed=seed + 3)
    yield Case(f"{name}, K={count}, heavy tails, {CANDIDATES:.0%} candidates", made.differences, candidates=kept)
    del made
    related = synthetic.family(real, queries, round(count**0.5), count, seed=seed)
    yield Case(f"{name}, K={count}, tree", related.differences, parent=related.parent)
