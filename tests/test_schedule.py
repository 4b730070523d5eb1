"""Schedules: weights against posterior variances written out, prediction types, every way to read one."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest

from guda_fast import Schedule
from guda_fast.diffusion.schedule import PREDICTION_TYPES

BETAS = np.linspace(1e-4, 0.02, 50)
TIMESTEPS = np.arange(1, 50)


def plain_alpha_bar(betas: np.ndarray) -> list[float]:
    product, found = 1.0, []
    for beta in betas:
        product *= 1.0 - float(beta)
        found.append(product)
    return found


@pytest.mark.parametrize("fixed_large", [False, True])
def test_elbo_weight_is_the_kl_of_posteriors(fixed_large: bool) -> None:
    schedule = Schedule(BETAS)
    alpha_bar = plain_alpha_bar(BETAS)
    weights = schedule.weights("elbo_fixed_large" if fixed_large else "elbo", TIMESTEPS)
    for t, weight in zip(TIMESTEPS, weights, strict=True):
        beta, bar, previous = float(BETAS[t]), alpha_bar[t], alpha_bar[t - 1]
        # The posterior mean moves by this much for a unit change of the predicted noise.
        by_x0 = np.sqrt(previous) * beta / (1 - bar)
        mean_change = by_x0 * np.sqrt(1 - bar) / np.sqrt(bar)
        variance = beta if fixed_large else beta * (1 - previous) / (1 - bar)
        assert weight == pytest.approx(mean_change**2 / (2 * variance), rel=1e-12)


@pytest.mark.parametrize("weighting", ["elbo", "elbo_fixed_large", "simple", "given"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_prediction_types_share_one_error(prediction_type: str, weighting: str) -> None:
    """The same prediction, told as epsilon, v or sample, has the same weighted error."""
    rng = np.random.default_rng(0)
    schedule = Schedule(BETAS, prediction_type)
    signal, sigma = schedule.scales(TIMESTEPS)
    x0, eps, eps_hat = rng.standard_normal((3, len(TIMESTEPS)))
    x_t = signal * x0 + sigma * eps
    x0_hat = (x_t - sigma * eps_hat) / signal
    told = {
        "epsilon": eps_hat,
        "v_prediction": signal * eps_hat - sigma * x0_hat,
        "sample": x0_hat,
    }[prediction_type]
    x0_scale, eps_scale = schedule.target_scales(TIMESTEPS)
    given = rng.random(len(TIMESTEPS)) if weighting == "given" else weighting
    native = schedule.weights(given, TIMESTEPS) * (told - x0_scale * x0 - eps_scale * eps) ** 2
    plain = Schedule(BETAS).weights(given, TIMESTEPS) * (eps_hat - eps) ** 2
    np.testing.assert_allclose(native, plain, rtol=1e-10)


SCHEDULERS = [
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_from_scheduler_objects_configs_and_files(name, beta_schedule, tmp_path) -> None:
    scheduler = getattr(diffusers, name)(num_train_timesteps=200, beta_schedule=beta_schedule)
    scheduler.save_pretrained(tmp_path)
    config = {**scheduler.config, "_class_name": name}
    for source in (scheduler, config, tmp_path, tmp_path / "scheduler_config.json"):
        schedule = Schedule.from_scheduler(source)
        np.testing.assert_array_equal(schedule.betas, scheduler.betas.double().numpy())
        # The scheduler's own product is float32: 200 roundings of 6e-8 relative.
        np.testing.assert_allclose(schedule.alpha_bar, scheduler.alphas_cumprod.double(), rtol=200 * 6e-8)


def test_long_cosine_schedule_uses_betas_and_not_differences_of_alpha_bar() -> None:
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2")
    schedule = Schedule.from_scheduler(scheduler)
    t = np.arange(1, 4000)
    beta = scheduler.betas.double().numpy()
    bar = np.array(plain_alpha_bar(beta))
    np.testing.assert_allclose(
        schedule.weights("elbo", t), beta[t] / (2 * (1 - beta[t]) * (1 - bar[t - 1])), rtol=1e-12
    )


def test_zero_terminal_snr_works_with_v_and_sample_only() -> None:
    config = {"num_train_timesteps": 100, "rescale_betas_zero_snr": True}
    for prediction_type in ("v_prediction", "sample"):
        scheduler = diffusers.DDPMScheduler(prediction_type=prediction_type, **config)
        schedule = Schedule.from_scheduler(scheduler)
        assert schedule.alpha_bar[-1] == 0
        for weighting in ("elbo", "elbo_fixed_large", "simple"):
            assert np.isfinite(schedule.weights(weighting, range(1, 100))).all()
    with pytest.raises(ValueError, match="alpha_bar must stay above 0 for epsilon predictions"):
        Schedule.from_scheduler(diffusers.DDPMScheduler(**config))


def test_errors(tmp_path) -> None:
    schedule = Schedule(BETAS)
    for call, message in [
        (lambda: Schedule(BETAS, "velocity"), "prediction_type must be one of"),
        (lambda: Schedule(np.zeros((2, 2))), r"betas must have shape \(T,\)"),
        (lambda: Schedule(np.array([0.1, 0.0, 0.1])), "betas must be in .* timestep 1"),
        (lambda: Schedule(np.array([0.1, np.nan])), "betas must be in .* timestep 1"),
        (lambda: schedule.weights("elbo", [50]), "timesteps must be between 0 and 49, got 50"),
        (lambda: schedule.weights("elbo", [-1]), "timesteps must be between 0 and 49, got -1"),
        (lambda: schedule.weights("elbo", [0]), "timesteps must be at least 1 for 'elbo'"),
        (lambda: schedule.weights("ebo", [1]), "weighting must be one of"),
        (lambda: schedule.weights([1.0, 2.0], [1]), "1 finite weights"),
        (lambda: schedule.weights([-1.0], [1]), "1 finite weights"),
        (lambda: Schedule.from_scheduler({"_class_name": "NoScheduler"}), "got 'NoScheduler'"),
        (lambda: Schedule.from_scheduler({"_class_name": "UNet2DModel"}), "got 'UNet2DModel'"),
        (lambda: Schedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler()), "must have betas"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="timesteps must be a sequence of integers"):
        schedule.weights("elbo", [1.5])
    with pytest.raises(FileNotFoundError, match="found no such file"):
        Schedule.from_scheduler(tmp_path)
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "DDPM')
    with pytest.raises(ValueError, match="scheduler_config.json: must be JSON in UTF-8, found a damaged file"):
        Schedule.from_scheduler(tmp_path)


def test_given_weights_may_use_timestep_zero() -> None:
    np.testing.assert_array_equal(Schedule(BETAS).weights([2.0, 3.0], [0, 1]), [2.0, 3.0])


def test_a_scheduler_with_another_alpha_bar_is_refused() -> None:
    with pytest.raises(ValueError, match=r"product of 1 - betas, got other values in CogVideoXDDIMScheduler"):
        Schedule.from_scheduler(diffusers.CogVideoXDDIMScheduler())


def test_a_schedule_does_not_change_with_the_callers_array() -> None:
    betas = BETAS.copy()
    schedule = Schedule(betas)
    betas[0] = 0.5
    assert schedule.betas[0] == BETAS[0]
