"""Results side by side: order, duplicates, and what is missing where."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from guda_fast.evaluation import join
from test_p_values import result_of


@pytest.fixture
def logo():
    return result_of(np.arange(12.0).reshape(4, 3), ["cat", "dog", "owl"])


def rows(result, order):
    return replace(
        result,
        queries=tuple(result.queries[row] for row in order),
        query_ids=tuple(result.query_ids[row] for row in order),
        scores=result.scores[order],
        draws=result.draws[order],
        exact=result.exact[order],
    )


def test_queries_are_joined_by_id_and_groups_by_name(logo) -> None:
    other = rows(replace(logo, scores=logo.scores + 100), [2, 0, 3, 1]).select(["owl", "cat", "dog"])
    found = join({"LOGO": logo, "GUDA": other})
    np.testing.assert_array_equal(found.scores["GUDA"], logo.scores + 100)
    np.testing.assert_array_equal(found.scores["LOGO"], logo.scores)
    assert (found.groups, found.queries, found.query_ids) == (logo.groups, logo.queries, logo.query_ids)
    assert found.notes == ()


def test_a_query_that_comes_twice_is_one(logo) -> None:
    found = join({"LOGO": rows(logo, [0, 1, 1, 2, 3, 0]), "GUDA": logo})
    np.testing.assert_array_equal(found.scores["LOGO"], logo.scores)
    twice = rows(logo, [0, 1, 2, 3, 3])
    twice.scores[4, 1] += 1
    with pytest.raises(ValueError, match=r"^GUDA: must have one score for a query, found others for 3\.png than for"):
        join({"LOGO": logo, "GUDA": twice})


def test_what_is_missing_where_is_named(logo) -> None:
    with pytest.raises(ValueError, match=r"^GUDA: must have the queries of LOGO, found 0\.png, 3\.png missing$"):
        join({"LOGO": logo, "GUDA": rows(logo, [1, 2])})
    with pytest.raises(ValueError, match=r"^GUDA: must have the queries of LOGO, found 0\.png, 3\.png besides$"):
        join({"LOGO": rows(logo, [1, 2]), "GUDA": logo})
    renamed = replace(logo, groups=("cat", "cow", "ant"))
    message = "^GUDA: must have the groups of LOGO, found dog, owl missing and found cow, ant besides$"
    with pytest.raises(ValueError, match=message):
        join({"LOGO": logo, "GUDA": renamed})
    many = result_of(np.zeros((9, 2)), ["a", "b"])
    with pytest.raises(ValueError, match=r"found 1\.png, 2\.png, 3\.png \(and 5 more\) missing"):
        join({"LOGO": many, "GUDA": rows(many, [0])})


def test_scores_that_are_not_finite_are_named(logo) -> None:
    bad = replace(logo, scores=np.where(logo.scores == 4, np.inf, logo.scores))
    with pytest.raises(ValueError, match="^GUDA: join: scores must be finite, got inf at query 1, group 1"):
        join({"LOGO": logo, "GUDA": bad})


def test_cells_that_were_not_considered_are_named(logo) -> None:
    sparse = replace(logo, scores=np.where(logo.scores % 6 == 4, np.nan, logo.scores))
    message = r"^GUDA: must have a score of every query .* found none of 1\.png under dog \(and 1 more cells\)$"
    with pytest.raises(ValueError, match=message):
        join({"LOGO": logo, "GUDA": sparse})
    with pytest.raises(ValueError, match="^subsets: must have a score of every query under every group"):
        join({"LOGO": logo}).rows_of("subsets", sparse)
    assert join({"LOGO": logo.select(["cat", "owl"]), "GUDA": sparse.select(["cat", "owl"])}).notes == ()


def test_estimates_are_compared_and_noted(logo) -> None:
    raced = replace(logo, exact=logo.scores >= 3)
    found = join({"LOGO": logo, "GUDA": raced})
    np.testing.assert_array_equal(found.scores["GUDA"], logo.scores)
    (note,) = found.notes
    assert note.startswith("25 % of the scores of GUDA are estimates, made to tell each query's top groups")


def test_another_base_or_protocol_is_noted(logo) -> None:
    found = join({"LOGO": logo, "GUDA": logo.with_provenance(protocol={"seed": 2}, base_hash="c")})
    assert found.notes == ("GUDA has another base than LOGO.", "GUDA has another protocol than LOGO.")
    assert join({"LOGO": logo, "CLIP": replace(logo, provenance={})}).notes == ()


def test_rows_of_further_results(logo) -> None:
    found = join({"LOGO": logo})
    subsets = rows(logo, [3, 2, 1, 0, 0])
    assert found.rows_of("subsets", subsets) == [3, 2, 1, 0]
    with pytest.raises(ValueError, match=r"^subsets: must have every query that is compared, found 1\.png missing"):
        found.rows_of("subsets", rows(logo, [3, 2, 0]))


def test_nothing_to_join() -> None:
    with pytest.raises(ValueError, match="join: results must hold at least one result"):
        join({})


def of_conditional_base(result):
    """The same images with a condition: other ids, in another order."""
    ids = tuple(number + 100 for number in result.query_ids)
    made = replace(result, query_ids=ids).with_provenance(conditions={"names": ["class_labels"]})
    return rows(made, [3, 1, 0, 2])


def test_a_conditional_base_is_joined_by_the_names_of_the_queries(logo) -> None:
    logo = logo.with_provenance(conditions={"names": []})
    other = of_conditional_base(logo)
    found = join({"LOGO": logo, "GUDA": other})
    np.testing.assert_array_equal(found.scores["GUDA"], logo.scores)
    (note,) = found.notes
    assert note.startswith("GUDA has no query id in common with LOGO") and "joined by the names" in note
    assert found.rows_of("subsets", other) == [2, 1, 3, 0]


def test_names_join_only_what_shares_no_id_and_has_distinct_equal_names(logo) -> None:
    other = of_conditional_base(logo)
    partial = replace(other, query_ids=(logo.query_ids[3], *other.query_ids[1:]))
    twice = replace(other, queries=("3.png", "1.png", "0.png", "0.png"))
    unlike = replace(other, queries=("3.png", "1.png", "0.png", "new.png"))
    for wrong in (partial, twice, unlike):
        with pytest.raises(ValueError, match="^GUDA: must have the queries of LOGO, found"):
            join({"LOGO": logo, "GUDA": wrong})
    # Without conditions an id is that of the image, so these images are others.
    plain = [found.with_provenance(conditions={"names": []}) for found in (logo, other)]
    with pytest.raises(ValueError, match="^GUDA: must have the queries of LOGO, found"):
        join(dict(zip(("LOGO", "GUDA"), plain, strict=True)))
