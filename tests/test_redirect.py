"""Redirect: its loss against a plain loop in float64, its gradient, and a fresh anchor for every image."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from guda_fast.counterfactuals.redirect import RedirectObjective
from operator_cases import (
    BATCH,
    NULL,
    assert_loss_is,
    distilled_loss,
    drawn,
    extreme_schedule,
    labelled_data,
    mean_square,
    predict,
)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_and_gradient_equal_a_plain_loop(prediction_type: str) -> None:
    data, schedule = labelled_data(), extreme_schedule(prediction_type)
    # Cumulative probabilities 0.25 (label 0) and 1 (label 2), of weights in another scale.
    table = {1: {0: 1.0, 2: 3.0}}

    def loop(student, base, generator):
        kept = distilled_loss(data, data.rest("dog"), schedule, student, base, generator)
        images = drawn(data, data.group("dog"), schedule, generator)
        anchors = [0 if u < 0.25 else 2 for u in torch.rand(BATCH, generator=generator).tolist()]
        assert set(anchors) == {0, 2}
        pairs = [
            (predict(student, image, 1), predict(base, image, anchor).detach())
            for image, anchor in zip(images, anchors, strict=True)
        ]
        return mean_square(pairs) + 1.5 * kept

    def make():
        return RedirectObjective(data, "dog", schedule, batch_size=BATCH, anchors=table, stability=1.5)

    assert_loss_is(make, schedule, loop)


def test_weights_are_those_of_the_design() -> None:
    objective = RedirectObjective(labelled_data(), "dog", extreme_schedule())
    assert (objective.retain_weight, objective.forget_weight, objective.forget_share) == (2.0, 1.0, None)


def test_anchors_are_drawn_anew_for_each_image_of_each_step() -> None:
    objective = RedirectObjective(labelled_data(), "dog", extreme_schedule(), batch_size=64, anchors="uniform")
    generator = torch.Generator().manual_seed(0)
    first, second = (objective.draw(generator).forget.target.conditions[0] for _ in range(2))
    assert set(first.tolist()) == {0, 2}
    assert not torch.equal(first, second)
    assert NULL not in first.tolist()


def test_errors() -> None:
    data, schedule = labelled_data(), extreme_schedule()
    with pytest.raises(ValueError, match="RedirectObjective: data must have conditions"):
        RedirectObjective(replace(data, conditions=None, null=None), "dog", schedule)
    with pytest.raises(ValueError, match="stability must be finite and at least 0"):
        RedirectObjective(data, "dog", schedule, stability=-1)
    with pytest.raises(ValueError, match="group must be one of cat, dog, eel, got 'fox'"):
        RedirectObjective(data, "fox", schedule)
