"""Percentile bootstrap interval of a mean over queries."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from guda_fast._validate import check_int, check_real

# Values drawn at once: 8 MiB of indices and as much of values, whatever the number of queries.
_DRAWN_AT_ONCE = 2**20


class Interval(NamedTuple):
    """A mean over queries and its interval.

    mean, low, high: the mean and the ends of the interval [NaN where no query has a value]
    queries: how many queries have a value
    missing: how many have none (NaN) and are left out
    """

    mean: float
    low: float
    high: float
    queries: int
    missing: int


def bootstrap_mean(
    values: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    sample_size: int | None = None,
) -> Interval:
    """Mean over queries with its percentile bootstrap interval.

    The interval is the ``(1 -+ confidence) / 2`` quantiles of the means of ``resamples`` samples drawn with
    replacement, whatever the order of the queries. NaN values are missing: left out, and counted.

    values: one value a query [(N,), real; NaN is missing, infinities are refused]
    confidence: the interval's coverage [above 0, below 1]
    resamples: bootstrap samples [at least 1]
    seed: of the generator [0 to 2^64 - 1]
    sample_size: how many values a bootstrap sample draws [None: as many as there are; at least 1]. A smaller
        one, with many values of a known distribution, gives the range for a mean over that many queries.
    Returns: the ``Interval``
    Raises: TypeError, ValueError for other arguments
    Source: Efron and Tibshirani 1993, chapter 13

    >>> bootstrap_mean([1.0, 1.0, float("nan")])
    Interval(mean=1.0, low=1.0, high=1.0, queries=2, missing=1)
    """
    where = "bootstrap_mean"
    array = _check_values(where, values)
    confidence = check_confidence(where, confidence)
    resamples = check_int(where, "resamples", resamples, 1)
    seed = check_int(where, "seed", seed, 0, 2**64 - 1)
    # Sorted, so that the same draws fall on the same values however the queries were ordered.
    present = np.sort(array[~np.isnan(array)])
    count, missing = len(present), len(array) - len(present)
    if count == 0:
        return Interval(np.nan, np.nan, np.nan, 0, missing)
    size = count if sample_size is None else check_int(where, "sample_size", sample_size, 1)
    means = _resampled_means(present, size, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(present.mean()), float(low), float(high), count, missing)


def _resampled_means(
    values: NDArray[np.float64], size: int, resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    means = np.empty(resamples)
    step = max(1, _DRAWN_AT_ONCE // size)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        picks = generator.integers(0, len(values), size=(stop - start, size))
        means[start:stop] = values[picks].mean(axis=1)
    return means


def check_confidence(where: str, confidence: float) -> float:
    """Check that ``confidence`` is a real number strictly between 0 and 1; return it."""
    value = check_real(where, "confidence", confidence, 0.0, 1.0)
    if not 0 < value < 1:
        raise ValueError(f"{where}: confidence must be above 0 and below 1, got {value!r}")
    return value


def _check_values(where: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{where}: values must be real numbers, got {array.dtype} array of shape {array.shape}")
    if array.ndim != 1:
        raise ValueError(f"{where}: values must have shape (N,), got {array.dtype} array of shape {array.shape}")
    result = array.astype(np.float64)
    if np.isinf(result).any():
        raise ValueError(f"{where}: values must not be infinite, got {result[np.isinf(result)][0]}")
    return result
