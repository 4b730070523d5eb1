"""EraseDiff: its loss against a plain loop in float64 for both prediction types, its gradient."""

from __future__ import annotations

import pytest
import torch

from guda_fast.counterfactuals.erasediff import EraseDiffObjective
from operator_cases import (
    BATCH,
    assert_loss_is,
    distilled_loss,
    drawn,
    extreme_schedule,
    labelled_data,
    mean_square,
    ordinary_loss,
    predict,
)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("retain", ["standard", "distill"])
def test_loss_and_gradient_equal_a_plain_loop(prediction_type: str, retain: str) -> None:
    data, schedule = labelled_data(), extreme_schedule(prediction_type)
    forget, rest = data.group("dog"), data.rest("dog")

    def loop(student, base, generator):
        if retain == "distill":
            kept = distilled_loss(data, rest, schedule, student, base, generator)
        else:
            kept = ordinary_loss(data, rest, schedule, student, generator)
        images = drawn(data, forget, schedule, generator)
        pairs = []
        for image, fresh in zip(images, torch.randn((BATCH, *data.images.shape[1:]), generator=generator), strict=True):
            wanted = fresh if prediction_type == "epsilon" else image.a * fresh - image.b * image.x0
            pairs.append((predict(student, image, 1), wanted))
        return kept + 0.7 * mean_square(pairs)

    def make():
        return EraseDiffObjective(data, "dog", schedule, batch_size=BATCH, weight=0.7, retain=retain)

    assert_loss_is(make, schedule, loop)


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
