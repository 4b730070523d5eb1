"""ESD: its loss against a plain loop in float64, its gradient, and which condition stands for none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from guda_fast.counterfactuals.esd import ESDObjective
from operator_cases import (
    BATCH,
    NULL,
    assert_loss_is,
    drawn,
    extreme_schedule,
    labelled_data,
    mean_square,
    ordinary_loss,
    predict,
)


def test_loss_and_gradient_equal_a_plain_loop() -> None:
    data, schedule, guidance = labelled_data(), extreme_schedule(), 7.5

    def loop(student, base, generator):
        kept = ordinary_loss(data, data.rest("dog"), schedule, student, generator)
        pairs = []
        for image in drawn(data, data.group("dog"), schedule, generator):
            eps_u, eps_c = (predict(base, image, given).detach() for given in (NULL, 1))
            pairs.append((predict(student, image, 1), eps_u - guidance * (eps_c - eps_u)))
        return kept + 0.7 * mean_square(pairs)

    assert_loss_is(lambda: ESDObjective(data, "dog", schedule, batch_size=BATCH, weight=0.7), schedule, loop)


def test_guided_predictions_agree_between_prediction_types() -> None:
    """The v that goes with a guided eps is the guided v, as the factors' sum is 1."""
    objective = ESDObjective(labelled_data(), "dog", extreme_schedule())
    factors = torch.tensor(objective.target.scales, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x_t, *eps = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    a, b = 0.6, 0.8
    x0 = [(x_t - b * noise) / a for noise in eps]
    v = torch.stack([a * noise - b * image for noise, image in zip(eps, x0, strict=True)])
    guided = factors @ torch.stack(eps)
    torch.testing.assert_close(factors @ v, a * guided - b * (x_t - b * guided) / a)


def test_null_of_the_data_or_given() -> None:
    data = labelled_data()
    named = ESDObjective(data, "dog", extreme_schedule(), batch_size=3)
    assert named.target.conditions[0].tolist() == [NULL] * 3
    given = ESDObjective(replace(data, null=None), "dog", extreme_schedule(), null=0)
    assert given.target.conditions[0].unique().tolist() == [0]


def test_errors() -> None:
    data, schedule = labelled_data(), extreme_schedule()
    with pytest.raises(ValueError, match="data must have conditions, got those of an unconditional model"):
        ESDObjective(replace(data, conditions=None, null=None), "dog", schedule)
    with pytest.raises(ValueError, match="null must be given where the data do not name their null condition"):
        ESDObjective(replace(data, null=None), "dog", schedule)
    with pytest.raises(ValueError, match="null must be between 0 and 3, got 4"):
        ESDObjective(data, "dog", schedule, null=4)
    with pytest.raises(ValueError, match="null must not be the condition of an image of 'dog', got row 1"):
        ESDObjective(data, "dog", schedule, null=1)
    with pytest.raises(ValueError, match="guidance must be finite and at least 0"):
        ESDObjective(data, "dog", schedule, guidance=-1)
    with pytest.raises(ValueError, match="weight must be finite and at least 0"):
        ESDObjective(data, "dog", schedule, weight=float("nan"))
