"""The scripts' arithmetic: the scheduler's float32 alpha_bar, and weights that posterior means come to with it."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import DDPMScheduler, PNDMScheduler

from guda_fast.errors import CheckpointError
from guda_fast.frontends.schedule import RoundedSchedule, quotient_betas, scheduler_betas, script_protocol

SCHEDULERS = {
    "CIFAR": DDPMScheduler(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2"),
    "SD": PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_alpha_bar_is_the_schedulers_to_the_bit(name: str) -> None:
    scheduler = SCHEDULERS[name]
    schedule = RoundedSchedule.of({**scheduler.config, "_class_name": type(scheduler).__name__}, "model")
    assert (schedule.alpha_bar == scheduler.alphas_cumprod.double().numpy()).all()
    exact = np.cumprod(1 - scheduler.betas.double().numpy())
    assert (schedule.alpha_bar != exact).any()
    t = list(range(1, len(schedule), 7))
    bar = scheduler.alphas_cumprod[t]
    signal, sigma = schedule.scales(t)
    np.testing.assert_allclose(signal, bar.sqrt().numpy(), rtol=1.2e-7)
    np.testing.assert_allclose(sigma, (1 - bar).sqrt().numpy(), rtol=1.2e-7)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_weights_are_the_divergence_of_posteriors_for_a_unit_error(name: str) -> None:
    scheduler = SCHEDULERS[name]
    schedule = RoundedSchedule.of({**scheduler.config, "_class_name": type(scheduler).__name__}, "model")
    t = np.arange(10, len(schedule), 10)
    bar, previous = (scheduler.alphas_cumprod.double().numpy()[step] for step in (t, t - 1))
    rounded = scheduler.alphas_cumprod
    quotients = (1 - rounded[t] / rounded[t - 1]).double().numpy()
    for found, expected in (
        (scheduler_betas(schedule, t.tolist()), scheduler.betas.double().numpy()[t]),
        (quotient_betas(schedule, t.tolist()), quotients),
    ):
        assert (found == expected).all()
        protocol = script_protocol(schedule, t.tolist(), found, seed=1)
        # An error of 1 in the noise moves x0 by sqrt(1 / alpha_bar - 1), and the posterior's mean by that times the
        # factor of x0 in it.
        moved = np.sqrt(1 / bar - 1) * expected * np.sqrt(previous) / (1 - bar)
        variance = expected * (1 - previous) / (1 - bar)
        np.testing.assert_allclose(protocol.table.weight, moved**2 / (2 * variance), rtol=1e-12)
    assert (scheduler_betas(schedule, t.tolist()) != quotients).any()


def test_a_scheduler_must_be_there_and_predict_noise() -> None:
    with pytest.raises(CheckpointError, match="model: must hold scheduler_config.json, found none"):
        RoundedSchedule.of(None, "model")
    config = {**DDPMScheduler(prediction_type="sample").config, "_class_name": "DDPMScheduler"}
    with pytest.raises(CheckpointError, match="key 'prediction_type' of the scheduler must be 'epsilon'"):
        RoundedSchedule.of(config, "model")
