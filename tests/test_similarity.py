"""Similarity baselines against a plain loop in float64."""

from __future__ import annotations

import importlib
import math
import sys

import numpy as np
import pytest
import torch

from guda_fast.baselines import pixel_similarity, similarity
from guda_fast.datasets import GroupedImages


def plain_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    pairs = list(zip(a.double().flatten().tolist(), b.double().flatten().tolist(), strict=True))
    lengths = math.sqrt(math.fsum(x * x for x, _ in pairs)) * math.sqrt(math.fsum(y * y for _, y in pairs))
    return math.fsum(x * y for x, y in pairs) / lengths if lengths else 0.0


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Five queries, 30 examples of 2 x 3 features, groups that overlap and leave examples out."""
    generator = torch.Generator().manual_seed(2)
    queries, examples = (torch.randn(count, 2, 3, generator=generator) for count in (5, 30))
    return queries, examples, {"a": torch.arange(0, 9), "b": torch.arange(5, 28), "c": torch.tensor([29])}


@pytest.mark.parametrize("at_once", [4, 1024])
@pytest.mark.parametrize(("reduce", "plain"), [("mean", lambda v: math.fsum(v) / len(v)), ("max", max)])
def test_similarity_is_the_plain_loop(case, reduce, plain, at_once, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, examples, members = case
    monkeypatch.setattr(sys.modules[similarity.__module__], "_EXAMPLES_AT_ONCE", at_once)
    found = similarity(queries, examples, members, reduce=reduce)
    expected = [[plain([plain_cosine(q, examples[i]) for i in index]) for index in members.values()] for q in queries]
    # Six products and up to 23 cosines are summed, each of at most 1, after two divisions: 40 roundings.
    np.testing.assert_allclose(found, expected, rtol=0, atol=40 * 2.0**-53)
    assert found.shape == (5, 3) and found.dtype == np.float64


def test_scale_does_not_matter_and_zeros_are_like_nothing(case) -> None:
    queries, examples, members = case
    expected = similarity(queries.double(), examples.double(), members)
    for factor in (2.0**-600, 2.0**600):
        # Powers of two, whose squares are beyond float64.
        np.testing.assert_array_equal(similarity(queries.double() * factor, examples.double(), members), expected)
    zeros = similarity(torch.zeros(1, 2, 3), examples, members)
    np.testing.assert_array_equal(zeros, np.zeros((1, 3)))
    examples[29] = 0
    np.testing.assert_array_equal(similarity(queries, examples, members)[:, 2], np.zeros(5))


def test_pixels_of_either_type_are_the_same() -> None:
    pixels = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    members = {"a": torch.tensor([0, 1]), "b": torch.tensor([2, 3, 4, 5])}
    values = pixels.float() / 127.5 - 1
    found = pixel_similarity(values[:2], GroupedImages(pixels, members))
    np.testing.assert_array_equal(found, pixel_similarity(values[:2], GroupedImages(values, members)))
    np.testing.assert_array_equal(found, similarity(values[:2], values, members))
    assert pixel_similarity(values[:1], GroupedImages(pixels, members), reduce="max")[0, 0] == pytest.approx(1)


def test_bad_arguments(case) -> None:
    queries, examples, members = case
    with pytest.raises(
        ValueError, match="similarity: reduce must be one of 'mean', 'max', 'top-k', 'centroid', got 'sum'"
    ):
        similarity(queries, examples, members, reduce="sum")
    with pytest.raises(ValueError, match=r"similarity: examples must have shape \(\*, 2, 3\)"):
        similarity(queries, examples.flatten(1), members)
    with pytest.raises(ValueError, match=r"similarity: members\['a'\] must be in \[0, 30\), got 30"):
        similarity(queries, examples, {"a": torch.tensor([30])})
    with pytest.raises(ValueError, match="similarity: members must have an example of every group, got none for 'a'"):
        similarity(queries, examples, {"a": torch.tensor([], dtype=torch.int64)})
    with pytest.raises(ValueError, match="similarity: members must have at least one group"):
        similarity(queries, examples, {})
    queries[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="similarity: queries must be finite"):
        similarity(queries, examples, members)
    data = GroupedImages(torch.zeros(2, 1, 4, 4), {"a": torch.tensor([0])})
    with pytest.raises(ValueError, match=r"pixel_similarity: queries must have shape \(\*, 1, 4, 4\)"):
        pixel_similarity(torch.zeros(1, 3, 4, 4), data)


@pytest.mark.parametrize("reduce", ["top-k", "centroid"])
def test_top_k_and_centroid_against_loops(reduce, monkeypatch) -> None:
    module = importlib.import_module("guda_fast.baselines.similarity")
    monkeypatch.setattr(module, "_EXAMPLES_AT_ONCE", 3)
    monkeypatch.setattr(module, "_QUERIES_AT_ONCE", 2)
    generator = torch.Generator().manual_seed(0)
    queries, examples = (torch.randn(count, 4, generator=generator, dtype=torch.float64) for count in (5, 11))
    members = {"a": torch.tensor([0, 1, 4, 5, 6, 7, 9]), "b": torch.tensor([2, 10])}
    found = similarity(queries, examples, members, reduce=reduce, k=3)

    def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(one @ other / (one.norm() * other.norm()))

    for row, query in enumerate(queries):
        for column, index in enumerate(members.values()):
            every = sorted((cosine(query, examples[place]) for place in index), reverse=True)[:3]
            expected = sum(every) / len(every) if reduce == "top-k" else cosine(query, examples[index].mean(dim=0))
            assert found[row, column] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("reduce", ["mean", "max", "top-k", "centroid"])
def test_cosines_are_those_of_scikit_learn(case, reduce) -> None:
    from sklearn.metrics.pairwise import cosine_similarity

    queries, examples, members = case
    flat, known = queries.double().flatten(1).numpy(), examples.double().flatten(1).numpy()
    reduced = {"mean": lambda v: v.mean(1), "max": lambda v: v.max(1), "top-k": lambda v: np.sort(v)[:, -4:].mean(1)}
    columns = [
        cosine_similarity(flat, known[index.numpy()].mean(axis=0)[None])[:, 0]
        if reduce == "centroid"
        else reduced[reduce](cosine_similarity(flat, known[index.numpy()]))
        for index in members.values()
    ]
    found = similarity(queries, examples, members, reduce=reduce, k=4)
    # As many roundings as for the plain loop, on both sides.
    np.testing.assert_allclose(found, np.stack(columns, axis=1), rtol=0, atol=80 * 2.0**-53)


def test_k_is_checked() -> None:
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        similarity(torch.eye(2), torch.eye(2), {"a": torch.tensor([0])}, reduce="top-k", k=0)


@pytest.mark.parametrize("at_once", [1, 3, 7, 1024])
@pytest.mark.parametrize("reduce", ["max", "top-k"])
def test_small_groups_share_a_product(reduce, at_once, monkeypatch) -> None:
    """Groups of one to nine examples: some share a product, some go on in the next one."""
    generator = torch.Generator().manual_seed(3)
    queries, examples = (torch.randn(count, 5, generator=generator).double() for count in (11, 60))
    sizes = [1, 9, 2, 2, 1, 8, 3, 9, 1]
    members = {str(n): torch.randperm(60, generator=generator)[:size] for n, size in enumerate(sizes)}
    whole = similarity(queries, examples, members, reduce=reduce, k=4)
    for name in ("_EXAMPLES_AT_ONCE", "_QUERIES_AT_ONCE"):
        monkeypatch.setattr(sys.modules[similarity.__module__], name, at_once)
    np.testing.assert_allclose(similarity(queries, examples, members, reduce=reduce, k=4), whole, rtol=0, atol=2e-15)
    highest = 1 if reduce == "max" else 4
    for column, index in enumerate(members.values()):
        expected = [np.mean(sorted(plain_cosine(q, examples[i]) for i in index)[-highest:]) for q in queries]
        np.testing.assert_allclose(whole[:, column], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("reduce", ["mean", "max", "top-k", "centroid"])
def test_products_are_made_where_they_are_asked_for(case, reduce, monkeypatch) -> None:
    """Every copy goes to the device that was named, which has no elements here, and nothing goes elsewhere."""
    queries, examples, members = case
    np.testing.assert_array_equal(
        similarity(queries, examples, members, reduce=reduce, device="cpu"),
        similarity(queries, examples, members, reduce=reduce),
    )
    with pytest.raises(NotImplementedError, match="[Mm]eta"):
        similarity(queries, examples, members, reduce=reduce, device="meta")
