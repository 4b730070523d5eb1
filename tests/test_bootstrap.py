"""Bootstrap intervals against known distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from guda_fast.evaluation import Interval, bootstrap_mean
from guda_fast.evaluation import bootstrap as bootstrap_module


def test_two_values_have_the_exact_quantiles() -> None:
    # A sample of two from {0, 1} has mean 0, 1/2, 1 with probability 1/4, 1/2, 1/4. With 10,000 samples the
    # shares stray by 0.005 (one standard deviation), far from the quantiles asked for.
    assert bootstrap_mean([0.0, 1.0]) == Interval(0.5, 0.0, 1.0, 2, 0)
    assert bootstrap_mean([0.0, 1.0], confidence=0.4) == Interval(0.5, 0.5, 0.5, 2, 0)


def test_ends_are_those_of_the_normal_distribution() -> None:
    count, resamples = 2000, 20_000
    values = np.random.default_rng(1).normal(3.0, 2.0, size=count)
    interval = bootstrap_mean(values, resamples=resamples, seed=4)
    sigma = values.std() / math.sqrt(count)
    # The 2.5 % quantile of `resamples` normal draws has standard error sqrt(q (1 - q) / R) / density; four of
    # them, and 1/count for how far a mean of 2,000 values is from normal.
    quantile, density = 1.959964, math.exp(-(1.959964**2) / 2) / math.sqrt(2 * math.pi)
    bound = (4 * math.sqrt(0.025 * 0.975 / resamples) / density + 1 / count) * sigma
    assert interval.mean == pytest.approx(values.mean(), rel=1e-12)
    assert abs(interval.low - (values.mean() - quantile * sigma)) < bound
    assert abs(interval.high - (values.mean() + quantile * sigma)) < bound


def test_coverage_of_a_bernoulli_mean() -> None:
    probability, queries, trials, confidence = 0.7, 200, 400, 0.9
    rng = np.random.default_rng(9)
    covered = 0
    for trial in range(trials):
        values = (rng.random(queries) < probability).astype(np.float64)
        interval = bootstrap_mean(values, confidence=confidence, resamples=1000, seed=trial)
        covered += interval.low <= probability <= interval.high
    # Percentile ends lie on the grid of 1/200 (a step is 0.154 standard deviations of the mean) and are
    # themselves estimates: half a step and 1 % of the quantile at either end move the coverage by at most
    # density(1.645) * 2 * (0.154 / 2 + 0.016) = 0.02. Beyond that, four binomial standard deviations.
    bound = 0.02 + 4 * math.sqrt(confidence * (1 - confidence) / trials)
    assert abs(covered / trials - confidence) < bound


def test_missing_values_are_left_out_and_counted() -> None:
    values = np.random.default_rng(0).normal(size=50)
    holes = np.insert(values, [0, 10, 50], np.nan)
    assert bootstrap_mean(holes) == bootstrap_mean(values)._replace(missing=3)


def test_nothing_left_gives_a_missing_interval() -> None:
    for values, missing in (([], 0), ([math.nan, math.nan], 2)):
        interval = bootstrap_mean(np.array(values))
        assert all(math.isnan(value) for value in interval[:3])
        assert interval[3:] == (0, missing)


def test_constant_and_single_values() -> None:
    assert bootstrap_mean([2.5]) == Interval(2.5, 2.5, 2.5, 1, 0)
    assert bootstrap_mean(np.full(7, 0.25), seed=3) == Interval(0.25, 0.25, 0.25, 7, 0)


def test_seeded_and_independent_of_the_order() -> None:
    values = np.random.default_rng(0).normal(size=101)
    first = bootstrap_mean(values, seed=2**64 - 1)
    assert bootstrap_mean(values[::-1], seed=2**64 - 1) == first
    assert bootstrap_mean(values, seed=1) != first


def test_memory_is_bounded_without_changing_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=101)
    expected = bootstrap_mean(values, resamples=999)
    # 250 indices at once are two samples a step, 10 less than one sample: still one.
    for limit in (250, 10):
        monkeypatch.setattr(bootstrap_module, "_DRAWN_AT_ONCE", limit)
        assert bootstrap_mean(values, resamples=999) == expected


def test_sample_size_widens_the_interval_as_the_square_root() -> None:
    values = np.random.default_rng(0).normal(size=10_000)
    interval = bootstrap_mean(values, sample_size=25)
    width = 2 * 1.959964 * values.std() / 5
    # Two quantiles of 10,000 samples, each with a standard error of 0.027 standard deviations of the mean:
    # four of them are 0.108 / 1.96 = 5.5 % at most.
    assert interval.high - interval.low == pytest.approx(width, rel=0.055)
    assert interval.queries == 10_000


@pytest.mark.parametrize(
    ("values", "options", "error", "message"),
    [
        (["a"], {}, TypeError, "values must be real numbers"),
        ([[1.0]], {}, ValueError, r"values must have shape \(N,\), got .* shape \(1, 1\)"),
        ([1.0, math.inf], {}, ValueError, "values must not be infinite, got inf"),
        ([1.0], {"confidence": 1.0}, ValueError, "confidence must be above 0 and below 1, got 1.0"),
        ([1.0], {"confidence": 95}, ValueError, "confidence must be between 0 and 1, got 95.0"),
        ([1.0], {"resamples": 0}, ValueError, "resamples must be at least 1, got 0"),
        ([1.0], {"seed": -1}, ValueError, "seed must be between 0 and"),
        ([1.0], {"sample_size": 0}, ValueError, "sample_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments(values: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"bootstrap_mean: {message}"):
        bootstrap_mean(values, **options)
