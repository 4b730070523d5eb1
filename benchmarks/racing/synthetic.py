"""Many groups with a known truth, spliced from real differences: not drawn from any estimator's model.

A query has one relevant group, whose per-draw differences are those of the top group of a real query. All other groups
are those of groups that were not top, K0 - 1 at a time from one real query, so that what groups of a query have in
common stays. Every cell has its own log-normal scale, which moves it off any common covariance. With heavy tails, one
draw of a cell in a hundred is multiplied by 1 + 3 t, t of Student's distribution with three degrees of freedom. The
truth of a case is the sum over its draws, whatever the relevant group was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from guda_fast.diffusion.schedule import FloatArray

SCALE = 0.5  # standard deviation of the logarithm of a cell's scale
TAIL_SHARE, TAIL_SIZE, TAIL_DEGREES = 0.01, 3.0, 3.0


@dataclass(frozen=True, eq=False)
class Spliced:
    """differences: [(N, K, D), float64]. relevant: of each query [(N,), int64]."""

    differences: FloatArray
    relevant: npt.NDArray[np.int64]


def spliced(real: FloatArray, queries: int, groups: int, *, heavy: bool, seed: int) -> Spliced:
    """Queries with so many groups.

    real: differences of real models [(N0, K0 >= 2, D), float64]. heavy: with heavy tails.
    """
    generator = np.random.default_rng(seed)
    differences, source = _irrelevant(real, queries, groups, generator)
    relevant = generator.integers(groups, size=queries)
    each = np.arange(queries)
    beside = source[each, relevant]
    scale = np.exp(SCALE * generator.standard_normal((queries, 1)))
    differences[each, relevant] = scale * real[beside, real.sum(axis=2).argmax(axis=1)[beside]]
    if heavy:
        for query in range(queries):
            hit = generator.random(differences.shape[1:]) < TAIL_SHARE
            differences[query, hit] *= 1 + TAIL_SIZE * generator.standard_t(TAIL_DEGREES, hit.sum())
    return Spliced(differences, relevant)


def _irrelevant(
    real: FloatArray, queries: int, groups: int, generator: np.random.Generator
) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Scaled rows of groups that are not top [(N, K, D)], and the real query that each is from [(N, K)]."""
    count, held, draws = real.shape
    keep = np.ones((count, held), dtype=bool)
    keep[np.arange(count), real.sum(axis=2).argmax(axis=1)] = False
    others = real[keep].reshape(count, held - 1, draws)
    source = generator.integers(count, size=(queries, -(-groups // (held - 1)))).repeat(held - 1, axis=1)[:, :groups]
    found = others[source, np.arange(groups) % (held - 1)]
    found *= np.exp(SCALE * generator.standard_normal((queries, groups, 1)))
    return found, source


@dataclass(frozen=True, eq=False)
class Family:
    """Groups with parents, which are groups too: the first of them.

    differences: parents, then children [(N, P + K, D), float64]. parent: of each child [(K,), int64].
    """

    differences: FloatArray
    parent: npt.NDArray[np.int64]


def family(real: FloatArray, queries: int, parents: int, children: int, *, seed: int) -> Family:
    """A hierarchy of two levels: without a parent's data, what its relevant child taught is gone too.

    Parents have rows of groups that are not top; that of the relevant group's parent has the relevant group's added.
    """
    low = spliced(real, queries, children, heavy=False, seed=seed)
    high, _ = _irrelevant(real, queries, parents, np.random.default_rng(seed + 1))
    parent = np.arange(children) * parents // children
    each = np.arange(queries)
    high[each, parent[low.relevant]] += low.differences[each, low.relevant]
    return Family(np.concatenate([high, low.differences], axis=1), parent)


def candidates(differences: FloatArray, count: int, noise: float, *, seed: int) -> npt.NDArray[np.bool_]:
    """The groups that a similarity would keep: the first by score plus normal noise, in the queries' own deviations.

    count: kept a query. noise: times the standard deviation of a query's scores.
    """
    score = differences.sum(axis=2)
    generator = np.random.default_rng(seed)
    proxy = score + noise * score.std(axis=1, keepdims=True) * generator.standard_normal(score.shape)
    kept = np.zeros(score.shape, dtype=bool)
    np.put_along_axis(kept, np.argpartition(-proxy, count - 1, axis=1)[:, :count], True, axis=1)
    return kept
