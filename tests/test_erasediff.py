"""EraseDiff: its loss against a plain loop in float64 for both prediction types, its gradient."""

from __future__ import annotations

import pytest
import torch

from guda_fast.counterfactuals.erasediff import EraseDiffObjective
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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("retain", ["standard", "distill"])
def test_loss_and_gradient_equal_a_plain_loop(prediction_type: str, retain: str) -> None:
    data, schedule = labelled_data(), extreme_schedule(prediction_type)

    def target(image, noise):
        return noise if prediction_type == "epsilon" else image.a * noise - image.b * image.x0

    with float64():
        student, base = Affine(1), Affine(2)
        objective = EraseDiffObjective(data, "dog", schedule, batch_size=BATCH, weight=0.7, retain=retain)
        loss = objective_loss(exact(objective, schedule), student, base, torch.Generator().manual_seed(5))
        again = torch.Generator().manual_seed(5)
        labels = data.conditions.row.tolist()
        retained = []
        for image in drawn(data, data.rest("dog"), schedule, again):
            label = labels[image.number]
            wanted = predict(base, image, label).detach() if retain == "distill" else target(image, image.eps)
            retained.append((predict(student, image, label), wanted))
        images = drawn(data, data.group("dog"), schedule, again)
        fresh = torch.randn((BATCH, *data.images.shape[1:]), generator=again)
        forgotten = [
            (predict(student, image, 1), target(image, noise)) for image, noise in zip(images, fresh, strict=True)
        ]
        expected = mean_square(retained) + 0.7 * mean_square(forgotten)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(slopes(student, loss), slopes(student, expected), rtol=1e-8, atol=1e-8)


def test_the_noise_asked_for_is_not_that_of_the_image() -> None:
    """Their correlation over 24,000 elements is within five standard errors of none."""
    data = labelled_data()
    rows = EraseDiffObjective(data, "dog", extreme_schedule(), batch_size=2000).draw(torch.Generator()).forget
    noised = rows.t == 2  # x_t is the noise of the image there, but for 0.7 % of x0
    pair = torch.stack([rows.x_t[noised].flatten(), rows.target[noised].flatten()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / pair.shape[1] ** 0.5


def test_errors() -> None:
    data = labelled_data()
    with pytest.raises(ValueError, match="schedule must predict epsilon or v_prediction, got 'sample'"):
        EraseDiffObjective(data, "dog", extreme_schedule("sample"))
    with pytest.raises(ValueError, match="weight must be finite and at least 0"):
        EraseDiffObjective(data, "dog", extreme_schedule(), weight=-0.1)
    with pytest.raises(ValueError, match="retain must be one of"):
        EraseDiffObjective(data, "dog", extreme_schedule(), retain="both")
