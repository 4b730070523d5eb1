"""Ranking metrics against hand-computed cases, plain loops, scipy, scikit-learn and published values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from guda_fast.evaluation import kendall, mrr, ndcg, rbo, spearman, top_1_agreement, top_k_overlap

Array = NDArray[np.float64]
Metric = Callable[[Any, Any], Array]

METRICS: dict[str, Metric] = {
    "top_k_overlap": lambda s, g: top_k_overlap(s, g, 2),
    "top_1_agreement": top_1_agreement,
    "mrr": mrr,
    "ndcg": lambda s, g: ndcg(s, g, 2),
    "rbo": rbo,
    "spearman": spearman,
    "kendall": kendall,
}
# At most K additions of numbers up to 1 with a rounding of 2^-53 each, on both sides.
ROUNDING = 2 * 40 * 2.0**-53


def plain_order(row: Array) -> list[int]:
    return sorted(range(len(row)), key=lambda k: (-row[k], k))


def plain_ndcg(s: Array, g: Array, k: int, gain: Callable[[int], int]) -> float:
    groups = len(s)
    rank = {group: place + 1 for place, group in enumerate(plain_order(g))}

    def dcg(order: list[int]) -> float:
        return math.fsum(gain(groups - rank[j]) / math.log2(i + 2) for i, j in enumerate(order[:k]))

    return dcg(plain_order(s)) / dcg(plain_order(g))


def plain_rbo(s: Array, g: Array, p: float) -> float:
    a, b = plain_order(s), plain_order(g)
    return math.fsum((1 - p) * p ** (d - 1) * len(set(a[:d]) & set(b[:d])) / d for d in range(1, len(a) + 1))


def plain_tau_b(s: Array, g: Array) -> float:
    pairs = [(i, j) for i in range(len(s)) for j in range(i)]
    signs = [(np.sign(s[i] - s[j]), np.sign(g[i] - g[j])) for i, j in pairs]
    untied = math.prod(sum(pair[side] != 0 for pair in signs) for side in (0, 1))
    return float(sum(a * b for a, b in signs) / math.sqrt(untied))


def plain_spearman(s: Array, g: Array) -> float:
    def mean_ranks(row: Array) -> list[float]:
        return [sum(row < value) + (sum(row == value) + 1) / 2 for value in row]

    return float(np.corrcoef(mean_ranks(s), mean_ranks(g))[0, 1])


@pytest.fixture(params=[(2, False), (7, False), (7, True), (40, True)], ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[Array, Array]:
    """Scores and oracle of 60 queries; with ties there are only a few distinct values a row."""
    groups, ties = request.param
    rng = np.random.default_rng(7)
    s, g = rng.normal(size=(2, 60, groups))
    if not ties:
        return s, g + 0.5 * s
    s, g = np.round(s), np.round(g + 0.5 * s)
    # No constant rows here: they have tests of their own.
    s[:, 0], s[:, 1], g[:, 0], g[:, 1] = 0, 1, 1, 0
    return s, g


def each(metric: Callable[[Array, Array], float], pair: tuple[Array, Array]) -> Array:
    return np.array([metric(s, g) for s, g in zip(*pair, strict=True)])


def test_top_k_overlap_is_the_plain_loop(pair: tuple[Array, Array]) -> None:
    for k in range(1, pair[0].shape[1] + 1):
        expected = each(lambda s, g: len({*plain_order(s)[:k]} & {*plain_order(g)[:k]}) / k, pair)  # noqa: B023
        np.testing.assert_array_equal(top_k_overlap(*pair, k), expected)


def test_top_1_and_mrr_are_the_plain_loop(pair: tuple[Array, Array]) -> None:
    place = each(lambda s, g: 1 + plain_order(s).index(plain_order(g)[0]), pair)
    np.testing.assert_array_equal(top_1_agreement(*pair), place == 1)
    np.testing.assert_array_equal(mrr(*pair), 1 / place)


@pytest.mark.parametrize("gain", ["exponential", "linear"])
def test_ndcg_is_the_plain_loop(pair: tuple[Array, Array], gain: str) -> None:
    plain_gain = {"exponential": lambda rel: 2**rel - 1, "linear": lambda rel: rel + 1}[gain]
    for k in (1, 2, pair[0].shape[1]):
        expected = each(lambda s, g: plain_ndcg(s, g, k, plain_gain), pair)  # noqa: B023
        np.testing.assert_allclose(ndcg(*pair, k, gain), expected, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("gain", ["exponential", "linear"])
def test_ndcg_is_scikit_learns_with_the_same_gains(gain: str) -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    s, g = np.random.default_rng(3).normal(size=(2, 50, 12))
    relevance = g.argsort(axis=1).argsort(axis=1)
    gains = 2.0**relevance - 1 if gain == "exponential" else relevance + 1.0
    expected = [sklearn_metrics.ndcg_score(gains[i : i + 1], s[i : i + 1], k=5) for i in range(len(s))]
    np.testing.assert_allclose(ndcg(s, g, 5, gain), expected, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_rbo_is_the_plain_loop(pair: tuple[Array, Array], p: float) -> None:
    np.testing.assert_allclose(rbo(*pair, p), each(lambda s, g: plain_rbo(s, g, p), pair), rtol=0, atol=ROUNDING)


def test_rank_correlations_are_plain_loops_and_scipy(pair: tuple[Array, Array]) -> None:
    for metric, plain, library in (
        (spearman, plain_spearman, lambda s, g: stats.spearmanr(s, g).statistic),
        (kendall, plain_tau_b, lambda s, g: stats.kendalltau(s, g).statistic),
    ):
        np.testing.assert_allclose(metric(*pair), each(plain, pair), rtol=0, atol=ROUNDING)
        np.testing.assert_allclose(metric(*pair), each(library, pair), rtol=0, atol=ROUNDING)


def test_hand_computed() -> None:
    # Method order: 0 1 2 3; oracle order: 2 0 3 1, so the oracle's ranks are 2 4 1 3 and rel is 2 0 3 1.
    s, g = [[4.0, 3.0, 2.0, 1.0]], [[7.0, -2.0, 9.0, 0.0]]
    assert top_k_overlap(s, g, 1) == 0
    assert top_k_overlap(s, g, 2) == 0.5
    assert mrr(s, g) == 1 / 3
    assert ndcg(s, g, 3) == pytest.approx((3 + 0 + 7 / 2) / (7 + 3 / math.log2(3) + 1 / 2), rel=1e-15)
    assert ndcg(s, g, 2, "linear") == pytest.approx((3 + 1 / math.log2(3)) / (4 + 3 / math.log2(3)), rel=1e-15)
    assert rbo(s, g, 0.5) == pytest.approx(0.5 * (0 + 0.5 * 1 / 2 + 0.25 * 2 / 3 + 0.125), rel=1e-15)
    # Rank differences -1, -2, 2, 1: 1 - 6 * 10 / 60. Pairs in order: 01, 03, 23 of 6.
    assert spearman(s, g) == 0
    assert kendall(s, g) == pytest.approx(0, abs=1e-16)


def test_perfect_and_reversed_rankings() -> None:
    g = np.random.default_rng(0).permuted(np.tile(np.arange(9.0), (20, 1)), axis=1)
    for metric in (
        top_1_agreement,
        mrr,
        spearman,
        lambda s, g: ndcg(s, g, 4),
        lambda s, g: top_k_overlap(s, g, 4),
    ):
        np.testing.assert_array_equal(metric(np.exp(g), g), 1.0)
    np.testing.assert_allclose(kendall(np.exp(g), g), 1, rtol=ROUNDING)
    np.testing.assert_allclose(rbo(g, g), 1 - 0.9**9, rtol=ROUNDING)
    np.testing.assert_array_equal(spearman(-g, g), -1.0)
    np.testing.assert_array_equal(mrr(-g, g), 1 / 9)


def test_equal_scores_rank_the_lower_group_first() -> None:
    tied = np.zeros((1, 20))
    falling, rising = -np.arange(20.0)[None], np.arange(20.0)[None]
    for name in ("top_k_overlap", "top_1_agreement", "mrr", "ndcg", "rbo"):
        metric = METRICS[name]
        np.testing.assert_array_equal(metric(tied, rising), metric(falling, rising))
        np.testing.assert_array_equal(metric(rising, tied), metric(rising, falling))


@pytest.mark.parametrize("metric", [spearman, kendall])
def test_a_constant_row_is_missing_without_a_warning(metric: Metric) -> None:
    s = np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    g = np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [4.0, 5.0, 6.0]])
    with np.errstate(all="raise"):
        np.testing.assert_allclose(metric(s, g), [np.nan, np.nan, 1.0], rtol=ROUNDING)
        assert np.isnan(metric(s[:2], g[:2])).all()


@pytest.mark.parametrize("name", METRICS)
def test_five_thousand_groups_do_not_overflow(name: str) -> None:
    g = np.random.default_rng(1).normal(size=(3, 5000))
    s = g.copy()
    s[1] = -s[1]
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        values = METRICS[name](s, g)
    # 1 (RBO: 1 - 0.9^5000 = 1) for the same ranking, less for the opposite one.
    np.testing.assert_allclose(values[[0, 2]], 1, rtol=5000 * 2.0**-53)
    assert np.isfinite(values).all() and values[1] < 0.01


def test_ndcg_of_many_groups_keeps_its_value() -> None:
    # At the top of 5,000 groups the gains are 1, 1/2, 1/4, ...: swapping the first two leaves this ratio.
    g = -np.arange(5000.0)[None]
    s = g.copy()
    s[0, :2] = g[0, 1::-1]
    expected = (1 / 2 + 1 / math.log2(3)) / (1 + 1 / 2 / math.log2(3))
    assert ndcg(s, g, 2) == pytest.approx(expected, rel=4 * 2.0**-52)


@pytest.mark.parametrize(
    ("metric", "groups", "published"),
    [
        (top_1_agreement, 10, 0.100),
        (mrr, 10, 0.293),
        (lambda s, g: ndcg(s, g, 3), 10, 0.294),
        (mrr, 16, 0.211),
        (lambda s, g: ndcg(s, g, 3, "linear"), 16, 0.558),
    ],
)
def test_random_rankings_have_the_published_values(metric: Metric, groups: int, published: float) -> None:
    count = 100_000
    s, g = np.random.default_rng(5).normal(size=(2, count, groups))
    values = metric(s, g)
    # Four standard errors, the rounding of a value with three decimals, and the draw behind the paper's own
    # row (2,048 or 320 queries; a thousandth covers what its rows differ by from the exact expectations).
    assert abs(values.mean() - published) < 4 * values.std() / math.sqrt(count) + 0.0005 + 0.001


@pytest.mark.parametrize("name", METRICS)
def test_accepted_inputs_and_result(name: str) -> None:
    metric = METRICS[name]
    s, g = np.random.default_rng(2).integers(0, 100, size=(2, 5, 6))
    expected = metric(s.astype(np.float64), g.astype(np.float64))
    assert expected.shape == (5,) and expected.dtype == np.float64
    np.testing.assert_array_equal(metric(s, g), expected)
    np.testing.assert_array_equal(metric(s.tolist(), np.asfortranarray(g)), expected)
    np.testing.assert_array_equal(metric(torch.tensor(s, dtype=torch.bfloat16), torch.tensor(g)), expected)
    assert metric(s[:0], g[:0]).shape == (0,)


@pytest.mark.parametrize("name", METRICS)
def test_bad_matrices_are_refused(name: str) -> None:
    metric, good = METRICS[name], np.ones((2, 3))
    bad = good.copy()
    bad[1, 2], bad[1, 1] = np.nan, np.inf
    with pytest.raises(ValueError, match=f"{name}: scores must be finite, got inf at query 1, group 1 and 1 more"):
        metric(bad, good)
    with pytest.raises(ValueError, match=f"{name}: oracle must be finite"):
        metric(good, bad)
    with pytest.raises(ValueError, match=rf"{name}: oracle must have shape \(2, 3\) as scores, got .*\(3, 3\)"):
        metric(good, np.ones((3, 3)))
    with pytest.raises(ValueError, match=rf"{name}: scores must have shape \(N, K\), got .* shape \(3,\)"):
        metric(good[0], good)
    with pytest.raises(ValueError, match=f"{name}: scores must have at least two groups"):
        metric(good[:, :1], good[:, :1])
    for wrong in (good > 0, good.astype(str), good + 1j, torch.ones(2, 3, dtype=torch.complex64)):
        with pytest.raises(TypeError, match=f"{name}: scores must be real numbers, got "):
            metric(wrong, good)


@pytest.mark.parametrize("k", [0, 4])
def test_k_is_checked(k: int) -> None:
    good = np.ones((2, 3))
    with pytest.raises(ValueError, match=f"top_k_overlap: k must be between 1 and 3, got {k}"):
        top_k_overlap(good, good, k)
    with pytest.raises(ValueError, match=f"ndcg: k must be between 1 and 3, got {k}"):
        ndcg(good, good, k)


def test_other_options_are_checked() -> None:
    good = np.ones((2, 3))
    with pytest.raises(TypeError, match=r"ndcg: k must be an integer, got 1\.0"):
        ndcg(good, good, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ndcg: gain must be one of 'exponential', 'linear', got 'log'"):
        ndcg(good, good, 1, "log")
    for p in (0.0, 1.0):
        with pytest.raises(ValueError, match="rbo: p must be above 0 and below 1"):
            rbo(good, good, p)
