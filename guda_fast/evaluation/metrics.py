"""Per-query agreement of a method's scores with an oracle's.

Every metric takes two score matrices of shape (N, K), the method's ``scores`` and the ``oracle``'s, and gives
one value a query. Rankings are by falling score; of equal scores the lower group index comes first. The rank
correlations are defined on tied ranks instead, and are NaN (missing) where either row is constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from guda_fast._validate import check_choice, check_int, check_real, describe

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def top_k_overlap(scores: ArrayLike, oracle: ArrayLike, k: int) -> FloatArray:
    """Share of the oracle's k top groups that are among the method's k top groups.

    ``|top_k(s) & top_k(g)| / k``

    scores: the method's scores s [(N, K), real and finite, K >= 2]
    oracle: the oracle's scores g [(N, K), real and finite]
    k: how many top groups [1 to K]
    Returns: one value a query [(N,), float64, 0 to 1]
    Raises: TypeError, ValueError for other arguments

    >>> top_k_overlap([[3.0, 2.0, 1.0]], [[1.0, 3.0, 2.0]], 2)
    array([0.5])
    """
    s, g = check_score_pair("top_k_overlap", scores, oracle)
    k = check_int("top_k_overlap", "k", k, 1, s.shape[1])
    shared = (descending_ranks(s) <= k) & (descending_ranks(g) <= k)
    result: FloatArray = shared.sum(axis=1) / np.float64(k)
    return result


def top_1_agreement(scores: ArrayLike, oracle: ArrayLike) -> FloatArray:
    """1 where the method's top group is the oracle's, else 0; arguments as in ``top_k_overlap``.

    >>> top_1_agreement([[3.0, 2.0], [1.0, 1.0]], [[9.0, 0.0], [0.0, 9.0]])
    array([1., 0.])
    """
    s, g = check_score_pair("top_1_agreement", scores, oracle)
    result: FloatArray = np.equal(s.argmax(axis=1), g.argmax(axis=1)).astype(np.float64)
    return result


def mrr(scores: ArrayLike, oracle: ArrayLike) -> FloatArray:
    """Reciprocal of the rank that the method gives to the oracle's top group (its mean is the MRR).

    ``1 / rank_s(argmax g)``, ranks from 1

    Arguments as in ``top_k_overlap``.
    Returns: one value a query [(N,), float64, 1/K to 1]

    >>> mrr([[3.0, 2.0, 1.0]], [[0.0, 9.0, 0.0]])
    array([0.5])
    """
    s, g = check_score_pair("mrr", scores, oracle)
    top = g.argmax(axis=1)[:, None]
    return 1.0 / np.take_along_axis(descending_ranks(s), top, axis=1)[:, 0]


def ndcg(scores: ArrayLike, oracle: ArrayLike, k: int, gain: str = "exponential") -> FloatArray:
    """Normalised discounted cumulative gain of the method's k top groups, relevance by the oracle's rank.

    ``DCG@k / ideal DCG@k``, ``DCG@k = sum over i = 1..k of gain(K - rank_g(group at i)) / log2(i + 1)``

    With ``rel = K - rank_g`` the gain is ``2^rel - 1`` (exponential; used for CIFAR-10) or ``rel + 1``
    (linear; used for UnlearnCanvas). Values of the two are not comparable.

    scores: the method's scores s [(N, K), real and finite, K >= 2]
    oracle: the oracle's scores g [(N, K), real and finite]
    k: the depth [1 to K]
    gain: "exponential" or "linear"
    Returns: one value a query [(N,), float64, 0 to 1]
    Raises: TypeError, ValueError for other arguments
    Source: Jarvelin and Kekalainen 2002; Burges et al. 2005 for the exponential gain

    >>> ndcg([[1.0, 2.0]], [[2.0, 1.0]], k=1, gain="linear")
    array([0.5])
    """
    s, g = check_score_pair("ndcg", scores, oracle)
    groups = s.shape[1]
    k = check_int("ndcg", "k", k, 1, groups)
    check_choice("ndcg", "gain", gain, ("exponential", "linear"))
    rank = np.arange(1.0, groups + 1)
    if gain == "exponential":
        # (2^(K - rank) - 1) * 2^(1 - K): the factor cancels in the ratio and keeps large K from overflowing.
        gains = np.exp2(1 - rank) - np.exp2(1.0 - groups)
    else:
        gains = groups - rank + 1
    discounts = 1 / np.log2(np.arange(2.0, k + 2))
    found = np.take_along_axis(descending_ranks(g), descending_order(s)[:, :k], axis=1)
    result: FloatArray = (gains[found - 1] * discounts).sum(axis=1) / (gains[:k] * discounts).sum()
    return result


def rbo(scores: ArrayLike, oracle: ArrayLike, p: float = 0.9) -> FloatArray:
    """Rank-biased overlap, truncated at depth K and not normalised (its greatest value is 1 - p^K).

    ``(1 - p) sum over d = 1..K of p^(d-1) |top_d(s) & top_d(g)| / d``

    scores: the method's scores s [(N, K), real and finite, K >= 2]
    oracle: the oracle's scores g [(N, K), real and finite]
    p: persistence [0 < p < 1]
    Returns: one value a query [(N,), float64, 0 to 1 - p^K]
    Raises: TypeError, ValueError for other arguments
    Source: Webber, Moffat and Zobel 2010, equation 4

    >>> rbo([[2.0, 1.0]], [[1.0, 2.0]], p=0.5)
    array([0.25])
    """
    s, g = check_score_pair("rbo", scores, oracle)
    p = check_real("rbo", "p", p, 0.0, 1.0)
    if not 0 < p < 1:
        raise ValueError(f"rbo: p must be above 0 and below 1, got {p!r}")
    depth = np.arange(1.0, s.shape[1] + 1)
    weights = (1 - p) * p ** (depth - 1) / depth
    # A group is in both tops from the deeper of its two ranks on, so it collects the weights from there.
    collected = weights[::-1].cumsum()[::-1]
    deeper = np.maximum(descending_ranks(s), descending_ranks(g))
    result: FloatArray = collected[deeper - 1].sum(axis=1)
    return result


def spearman(scores: ArrayLike, oracle: ArrayLike) -> FloatArray:
    """Spearman's rank correlation of each query's scores, ties at their mean rank.

    Arguments as in ``top_k_overlap``.
    Returns: one value a query [(N,), float64, -1 to 1; NaN where either row is constant]

    >>> spearman([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]], [[1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    array([0.5, nan])
    """
    s, g = check_score_pair("spearman", scores, oracle)
    return _spearman(s, g)


def lds(scores: ArrayLike, outcomes: ArrayLike, removed: ArrayLike) -> FloatArray:
    """Linear datamodelling score: how well sums of group scores rank models retrained without several groups.

    ``spearman over j of (outcomes_j, sum over k in removed_j of s_k)``

    An outcome is the score of a model retrained without all groups of a subset: the ELBO of the full model less that of
    this one. With the groups that remain in the place of those removed, both sides change their sign and no more.

    scores: the method's scores s [(N, K), real and finite, K >= 2]
    outcomes: the score of each retrained model [(N, J), real and finite, J >= 2]
    removed: which groups each was trained without [(J, K), bool]
    Returns: one value a query [(N,), float64, -1 to 1; NaN where either side is constant]
    Raises: TypeError, ValueError for other arguments
    Source: Park et al. 2023 (TRAK), definition 2.3

    >>> lds([[3.0, 1.0]], [[3.5, 0.9, 4.0]], [[True, False], [False, True], [True, True]])
    array([1.])
    """
    s, g = check_scores("lds", "scores", scores), check_scores("lds", "outcomes", outcomes)
    if len(s) != len(g):
        raise ValueError(f"lds: outcomes must have {len(s)} rows as scores, got {_describe_array(g)}")
    subsets: NDArray[Any] = np.asarray(removed)
    if subsets.dtype != np.bool_:
        raise TypeError(f"lds: removed must be bool, got {_describe_array(subsets)}")
    if subsets.shape != (g.shape[1], s.shape[1]):
        wanted = f"({g.shape[1]}, {s.shape[1]}), a row an outcome and a column a group"
        raise ValueError(f"lds: removed must have shape {wanted}, got {_describe_array(subsets)}")
    # Summed exactly, so that subsets of equal sums are tied whatever the order of their groups.
    predicted = [[math.fsum(row[subset]) for subset in subsets] for row in s]
    return _spearman(np.reshape(predicted, g.shape), g)


def kendall(scores: ArrayLike, oracle: ArrayLike) -> FloatArray:
    """Kendall's tau-b of each query's scores, which corrects for ties.

    Arguments as in ``top_k_overlap``.
    Returns: one value a query [(N,), float64, -1 to 1; NaN where either row is constant]
    Source: Kendall 1945

    >>> kendall([[1.0, 2.0, 3.0]], [[1.0, 3.0, 2.0]]).round(4)
    array([0.3333])
    """
    from scipy.stats import kendalltau  # heavy

    s, g = check_score_pair("kendall", scores, oracle)
    defined = ~(_constant(s) | _constant(g))
    values = [
        float(kendalltau(s_row, g_row, variant="b").statistic)
        for s_row, g_row in zip(s[defined], g[defined], strict=True)
    ]
    return _fill(defined, np.array(values, dtype=np.float64))


def descending_order(scores: FloatArray) -> IntArray:
    """Group indices of each row by falling score, equal scores by rising index. [(N, K) -> (N, K)]"""
    return np.argsort(-scores, axis=1, kind="stable")


def descending_ranks(scores: FloatArray) -> IntArray:
    """Rank of each group in its row, from 1 for the highest score. [(N, K) -> (N, K)]"""
    order = descending_order(scores)
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(1, scores.shape[1] + 1)[None, :], axis=1)
    return ranks


def check_scores(where: str, name: str, value: ArrayLike) -> FloatArray:
    """Check that ``value`` is a finite real (N, K) matrix with K >= 2; return it as float64."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy() if not value.is_complex() else value.detach().cpu().numpy()
    array: NDArray[Any] = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{where}: {name} must be real numbers, got {_describe_array(array)}")
    if array.ndim != 2:
        raise ValueError(f"{where}: {name} must have shape (N, K), got {_describe_array(array)}")
    if array.shape[1] < 2:
        raise ValueError(f"{where}: {name} must have at least two groups, got {_describe_array(array)}")
    result = array.astype(np.float64, copy=False)
    bad = np.argwhere(~np.isfinite(result))
    if len(bad):
        row, column = (int(index) for index in bad[0])
        raise ValueError(
            f"{where}: {name} must be finite, got {result[row, column]} at query {row}, group {column}"
            + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
        )
    return result


def check_score_pair(where: str, scores: ArrayLike, oracle: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Check both matrices and that their shapes are equal; return them as float64."""
    s, g = check_scores(where, "scores", scores), check_scores(where, "oracle", oracle)
    if s.shape != g.shape:
        raise ValueError(f"{where}: oracle must have shape {s.shape} as scores, got {_describe_array(g)}")
    return s, g


def check_names(where: str, name: str, value: Sequence[str], count: int | None = None) -> tuple[str, ...]:
    """Check that ``value`` is a sequence of strings, ``count`` of them unless None; return it as a tuple."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{where}: {name} must be a sequence of strings, got {describe(value)}")
    for item in value:
        if not isinstance(item, str):
            raise TypeError(f"{where}: {name} must be a sequence of strings, got {describe(item)} in it")
    if count is not None and len(value) != count:
        raise ValueError(f"{where}: {name} must have one name for each of {count}, got {len(value)} names")
    return tuple(value)


def _describe_array(array: NDArray[Any]) -> str:
    return f"{array.dtype} array of shape {array.shape}" if array.ndim else describe(array.item())


def _spearman(s: FloatArray, g: FloatArray) -> FloatArray:
    from scipy.stats import rankdata  # heavy

    defined = ~(_constant(s) | _constant(g))
    # The mean rank is (K + 1) / 2 with or without ties. Centred ranks are halves of integers: sums are exact.
    centre = (s.shape[1] + 1) / 2
    a = rankdata(s[defined], axis=1) - centre
    b = rankdata(g[defined], axis=1) - centre
    return _fill(defined, (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1)))


def _constant(scores: FloatArray) -> NDArray[np.bool_]:
    result: NDArray[np.bool_] = np.equal(scores.min(axis=1), scores.max(axis=1))
    return result


def _fill(defined: NDArray[np.bool_], values: FloatArray) -> FloatArray:
    result = np.full(len(defined), np.nan)
    result[defined] = values
    return result
