"""SISS: its loss against a plain loop in float64, its expectation, its gradient."""

from __future__ import annotations

import pytest
import torch

from guda_fast.counterfactuals.siss import SISSObjective
from guda_fast.datasets import GroupedImages
from operator_cases import (
    BATCH,
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


def test_loss_and_gradient_equal_a_plain_loop() -> None:
    data, schedule = labelled_data(), extreme_schedule()
    n, k, scale = 15, 4, 1.5
    with float64():
        student = Affine(1)
        objective = SISSObjective(data, "dog", schedule, batch_size=BATCH, scale=scale)
        loss = objective_loss(exact(objective, schedule), student, Affine(2), torch.Generator().manual_seed(5))
        again = torch.Generator().manual_seed(5)
        labels = data.conditions.row.tolist()
        means = [
            mean_square(
                [
                    (predict(student, image, labels[image.number]), image.eps)
                    for image in drawn(data, index, schedule, again)
                ]
            )
            for index in (torch.arange(n), data.group("dog"))
        ]
        expected = n / (n - k) * means[0] - scale * k / (n - k) * means[1]
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(slopes(student, loss), slopes(student, expected), rtol=1e-8, atol=1e-8)


def test_the_terms_add_up_to_the_loss_of_what_remains() -> None:
    """Over all n images once and the group's k once, the weighted sum of a constant an image is the rest's mean."""
    data = labelled_data()
    objective = SISSObjective(data, "dog", extreme_schedule())
    losses = torch.rand(len(data), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    combined = objective.retain_weight * losses.mean() + objective.forget_weight * losses[data.group("dog")].mean()
    torch.testing.assert_close(combined, losses[data.rest("dog")].mean())


def test_rows_to_retain_come_from_all_data() -> None:
    data = labelled_data()
    objective = SISSObjective(data, "dog", extreme_schedule(), batch_size=500)
    batch = objective.draw(torch.Generator().manual_seed(0))
    assert set(batch.retain.condition.tolist()) == {0, 1, 2}
    assert set(batch.forget.condition.tolist()) == {1}
    assert objective.forget_share == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1}, "scale must be finite and at least 0"),
        ({"share": 1.5}, "share must be between 0 and 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_errors(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        SISSObjective(labelled_data(), "dog", extreme_schedule(), **options)


def test_a_group_that_is_everything() -> None:
    data = GroupedImages(torch.zeros(3, 1, 2, 2), {"all": torch.arange(3)})
    with pytest.raises(ValueError, match="group 'all' holds all 3 images"):
        SISSObjective(data, "all", extreme_schedule())
