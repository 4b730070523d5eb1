"""Anchors: their probabilities by formulas written out, their draws, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch

from guda_fast.counterfactuals.anchors import Anchors, make_anchors
from guda_fast.datasets import GroupedImages, with_controls
from guda_fast.datasets.typefaces import load_typefaces
from guda_fast.diffusion.conditions import Conditions
from operator_cases import labelled_data

STYLES = ("cubism", "fauvism", "pop")
# Rows: style * 2 + object for two objects, then the objects without a style.
CAT, BOAT = 6, 7
REMOVED = torch.tensor([CAT, BOAT, CAT, BOAT, CAT, BOAT, CAT, BOAT])
KEYS = ("cubist cat", "cubist boat", "fauve cat", "fauve boat", "pop cat", "pop boat", "cat", "boat")
# Images a condition has: pop has no boats.
COUNTS = (2, 3, 1, 4, 5, 0)
DESCRIPTORS = {
    "cubism": torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0]]),
    "fauvism": torch.tensor([[3.0, 0.0], [0.8, 0.6]]),
    "pop": torch.tensor([[0.0, -1.0]]),
}


def painted(keys: tuple[str, ...] | None = KEYS) -> GroupedImages:
    row = torch.tensor([condition for condition, count in enumerate(COUNTS) for _ in range(count)])
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((len(row), 1, 2, 2), generator=generator) * 2 - 1
    members = {style: (row // 2 == k).nonzero().squeeze(1) for k, style in enumerate(STYLES)}
    conditions = Conditions({"class_labels": torch.arange(8)}, row, keys)
    return GroupedImages(images, members, conditions, removed=REMOVED)


def plain_style_shares(descriptors: dict[str, torch.Tensor], others: list[str], beta: float, eta: float) -> list[float]:
    """The mean over the group's descriptors of (1 - eta) softmax(beta cos) + eta uniform."""
    prototypes = []
    for name in others:
        units = [row / row.norm() for row in descriptors[name].double()]
        prototypes.append(sum(units) / len(units))
    shares = [0.0] * len(others)
    own = descriptors["cubism"].double()
    for row in own:
        powers = [math.exp(beta * float(row @ p) / float(row.norm() * p.norm())) for p in prototypes]
        for s, power in enumerate(powers):
            shares[s] += ((1 - eta) * power / sum(powers) + eta / len(others)) / len(own)
    return shares


def test_weighted_style_equals_the_formula() -> None:
    found = make_anchors("weighted_style", painted(), "cubism", descriptors=DESCRIPTORS, beta=1.3, eta=0.2)
    fauve, pop = plain_style_shares(DESCRIPTORS, ["fauvism", "pop"], 1.3, 0.2)
    # Cats go to cats; boats to fauve ones, as pop has none.
    expected = [[0, 0, fauve, 0, pop, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]]
    assert found.conditions.tolist() == [0, 1]
    torch.testing.assert_close(found.probability, torch.tensor(expected, dtype=torch.float64))
    assert fauve > 0.6  # nearer than pop, or the formula would not matter


def test_weighted_style_without_descriptors_prefers_groups_that_look_alike() -> None:
    ramp = torch.linspace(-1, 1, 9)
    shown = torch.stack([ramp, ramp.flip(0), 0.5 * ramp, -0.9 * ramp])[:, None, None].expand(4, 1, 3, 9)
    images = shown.repeat_interleave(4, dim=0).contiguous()
    labels = torch.arange(4).repeat_interleave(4)
    data = GroupedImages.by_label(images, labels, ("up", "down", "rather up", "rather down"))
    data = replace(data, conditions=Conditions({"class_labels": torch.arange(4)}, labels))
    probability = make_anchors("weighted_style", data, "up").probability[0]
    # The cosine is 1 for what looks alike and -1 for the others, up to the mean of all images.
    alike = 0.7 * math.exp(2) / (math.exp(2) + 2 * math.exp(-2)) + 0.1
    torch.testing.assert_close(probability[2], torch.tensor(alike, dtype=torch.float64))


def test_uniform_matched_and_removed() -> None:
    data = painted()
    expected = {
        "uniform": [[0, 0, 0.5, 0, 0.5, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]],
        "matched": [[0, 0, 1 / 6, 0, 5 / 6, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]],
        "removed": [[0, 0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 1]],
    }
    for kind, rows in expected.items():
        found = make_anchors(kind, data, "cubism").probability
        torch.testing.assert_close(found, torch.tensor(rows, dtype=torch.float64), msg=kind)


def test_labels_of_groups_are_one_object() -> None:
    found = make_anchors("uniform", labelled_data(), "dog")
    torch.testing.assert_close(found.probability, torch.tensor([[0.5, 0, 0.5, 0]], dtype=torch.float64))


def test_typefaces_redirect_glyphs_to_the_same_glyph() -> None:
    """Conditions are font * 2 + glyph, and 2 * fonts + glyph for the glyph without a font."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    data = load_typefaces(
        3, glyphs="AB", size=8, repeats=2, conditions="font-glyph", null=True, styles="all", folder=folder
    )
    for kind in ("weighted_style", "uniform", "matched", "removed"):
        found = make_anchors(kind, data, data.groups[0])
        assert found.conditions.tolist() == [0, 1]
        anchors = [row.nonzero().flatten().tolist() for row in found.probability]
        assert anchors == ([[6], [7]] if kind == "removed" else [[2, 4], [3, 5]])


def test_control_groups_are_no_styles_but_have_anchors() -> None:
    data = with_controls(painted(), 2, size=6)
    for kind in ("weighted_style", "uniform", "matched", "removed"):
        found = make_anchors(kind, data, "cubism")
        torch.testing.assert_close(found.probability.sum(dim=1), torch.ones(2, dtype=torch.float64))
    alone = make_anchors("uniform", painted(), "cubism").probability
    assert torch.equal(make_anchors("uniform", data, "cubism").probability, alone)
    of_control = make_anchors("uniform", data, "control-0")
    assert of_control.conditions.tolist() == data.conditions.row[data.group("control-0")].unique().tolist()


def test_a_table_is_read_by_keys_or_rows() -> None:
    table = {"cubist cat": {"pop cat": 3, "cat": 1}, "cubist boat": {"boat": 0.2}, "pop cat": {"cat": 1}}
    expected = torch.tensor([[0, 0, 0, 0, 0.75, 0, 0.25, 0], [0, 0, 0, 0, 0, 0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(make_anchors(table, painted(), "cubism").probability, expected)
    rows = {0: {4: 3, 6: 1}, 1: {7: 0.2}}
    torch.testing.assert_close(make_anchors(rows, painted(keys=None), "cubism").probability, expected)


def test_draws_follow_the_probabilities() -> None:
    probability = torch.tensor([[0, 0.3, 0, 0.7, 0], [1, 0, 0, 0, 0]], dtype=torch.float64)
    anchors = Anchors(torch.tensor([2, 4]), probability)
    rows = torch.tensor([2, 4]).repeat(20_000)
    found = anchors.draw(rows, torch.Generator().manual_seed(0))
    assert found[rows == 4].unique().tolist() == [0]
    counts = torch.bincount(found[rows == 2], minlength=5)
    assert counts[[0, 2, 4]].tolist() == [0, 0, 0]
    # Five standard deviations of a binomial count.
    assert abs(int(counts[1]) - 6000) < 5 * math.sqrt(20_000 * 0.3 * 0.7)
    assert torch.equal(found, anchors.draw(rows, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("anchors", "options", "error", "message"),
    [
        ("nearest", {}, ValueError, "anchors must be one of 'weighted_style', 'uniform', 'removed', 'matched'"),
        ({"pop cat": {"cat": 1}}, {}, ValueError, "every condition of 'cubism', got a table without 'cubist cat'"),
        (
            {"cubist cat": {"cat": 1}},
            {},
            ValueError,
            "every condition of 'cubism', got a table without 'cubist boat'",
        ),
        (
            {"cubist cat": {"dog": 1}, "cubist boat": {"boat": 1}},
            {},
            ValueError,
            "anchors of 'cubist cat' must be conditions of the data, got 'dog'",
        ),
        (
            {"cubist cat": {"cubist cat": 1}, "cubist boat": {"boat": 1}},
            {},
            ValueError,
            "anchors must be other conditions, got 'cubist cat' for itself",
        ),
        (
            {"cubist cat": {"cat": 0}, "cubist boat": {"boat": 1}},
            {},
            ValueError,
            "every condition of 'cubism' must have an anchor, got none for 'cubist cat'",
        ),
        (
            {"cubist cat": {"cat": -1}, "cubist boat": {"boat": 1}},
            {},
            ValueError,
            r"anchors\['cubist cat'\]\['cat'\] must be finite and at least 0",
        ),
        ("weighted_style", {"beta": -1}, ValueError, "beta must be finite and at least 0"),
        ("weighted_style", {"eta": 1.1}, ValueError, "eta must be between 0 and 1"),
        (
            "weighted_style",
            {"descriptors": {"fauvism": torch.ones(1, 2), "pop": torch.ones(1, 2)}},
            ValueError,
            "descriptors must have group 'cubism'",
        ),
        (
            "weighted_style",
            {"descriptors": {**DESCRIPTORS, "pop": torch.ones(1, 3)}},
            ValueError,
            r"descriptors\['pop'\] must have shape \(\*, 2\)",
        ),
        (
            "weighted_style",
            {"descriptors": {**DESCRIPTORS, "pop": torch.zeros(1, 2)}},
            ValueError,
            r"descriptors\['pop'\] must be finite and not zero",
        ),
    ],
)
def test_errors(anchors, options, error, message) -> None:
    with pytest.raises(error, match=message):
        make_anchors(anchors, painted(), "cubism", **options)


def test_errors_of_data() -> None:
    data = painted()
    with pytest.raises(ValueError, match="anchors must not be 'removed' where data.removed is not given"):
        make_anchors("removed", replace(data, removed=None), "cubism")
    with pytest.raises(ValueError, match="data.removed must say which conditions have the same object"):
        make_anchors("uniform", replace(data, removed=None), "cubism")
    with pytest.raises(ValueError, match="data must have conditions"):
        make_anchors("uniform", replace(data, conditions=None, removed=None), "cubism")
    alone = replace(data, members={"cubism": data.group("cubism")})
    with pytest.raises(ValueError, match="data must have other groups than 'cubism' for 'uniform' anchors"):
        make_anchors("uniform", alone, "cubism")
    # The object alone as the condition, of which every group has the same.
    objects = replace(data, conditions=replace(data.conditions, row=REMOVED[data.conditions.row]))
    with pytest.raises(ValueError, match="every condition of 'cubism' must have an anchor, got none for 'cat'"):
        make_anchors("uniform", objects, "cubism")
