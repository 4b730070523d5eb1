"""Redirect: its loss against a plain loop in float64, its gradient, and a fresh anchor for every image."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from guda_fast.counterfactuals.redirect import RedirectObjective
from operator_cases import (
    BATCH,
    NULL,
    Affine,
    drawn,
    exact,
    extreme_schedule,
    float64,
    labelled_data,
    mean_square,
    objective_loss,
    predict,
    slopes,
)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_and_gradient_equal_a_plain_loop(prediction_type: str) -> None:
    data, schedule = labelled_data(), extreme_schedule(prediction_type)
    # Cumulative probabilities 0.25 (label 0) and 1 (label 2), of weights in another scale.
    table = {1: {0: 1.0, 2: 3.0}}
    with float64():
        student, base = Affine(1), Affine(2)
        objective = RedirectObjective(data, "dog", schedule, batch_size=BATCH, anchors=table, stability=1.5)
        loss = objective_loss(exact(objective, schedule), student, base, torch.Generator().manual_seed(5))
        again = torch.Generator().manual_seed(5)
        labels = data.conditions.row.tolist()
        retained = []
        for image in drawn(data, data.rest("dog"), schedule, again):
            label = labels[image.number]
            retained.append((predict(student, image, label), predict(base, image, label).detach()))
        images = drawn(data, data.group("dog"), schedule, again)
        anchors = [0 if u < 0.25 else 2 for u in torch.rand(BATCH, 1, generator=again).flatten().tolist()]
        assert set(anchors) == {0, 2}
        forgotten = [
            (predict(student, image, 1), predict(base, image, anchor).detach())
            for image, anchor in zip(images, anchors, strict=True)
        ]
        expected = mean_square(forgotten) + 1.5 * mean_square(retained)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(slopes(student, loss), slopes(student, expected), rtol=1e-8, atol=1e-8)


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
