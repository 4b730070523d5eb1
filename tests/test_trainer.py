"""The training loop: it learns, repeats itself, leaves its input alone and stops at NaN."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDPMScheduler

from guda_fast import Schedule
from guda_fast.counterfactuals import DenoisingObjective, TrainConfig, train
from guda_fast.counterfactuals.trainer import Noising
from guda_fast.datasets import load_digits
from tiny import Scaled, tiny_unet

SCHEDULE = Schedule.from_scheduler(DDPMScheduler())


@pytest.mark.slow
def test_training_lowers_the_loss_and_leaves_the_model_alone() -> None:
    model = tiny_unet()
    before = copy.deepcopy(model.state_dict())
    steps: list[tuple[int, int]] = []
    objective = DenoisingObjective(load_digits().images, SCHEDULE, 32)
    result = train(model, objective, TrainConfig(60, lr=3e-3), progress=lambda *done: steps.append(done))
    assert sum(result.losses[-10:]) < 0.6 * sum(result.losses[:10])
    assert steps == [(step, 60) for step in range(1, 61)]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not result.model.training
    assert not any(parameter.requires_grad for parameter in result.model.parameters())


def test_a_seed_repeats_a_run_and_another_does_not() -> None:
    objective = DenoisingObjective(load_digits().images, SCHEDULE, 8)

    def losses(seed: int) -> list[float]:
        return list(train(tiny_unet(), objective, TrainConfig(3, seed=seed)).losses)

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_ema_follows_the_warming_decay() -> None:
    """One parameter and the plain recursion."""
    visited = []

    def objective(model: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
        visited.append(model.factor.item())
        return (model.factor - 2).square()

    last = train(Scaled(0.0), objective, TrainConfig(4, lr=0.1)).model.factor.item()
    visited.clear()
    averaged = train(Scaled(0.0), objective, TrainConfig(4, lr=0.1, ema_decay=0.3)).model.factor.item()
    expected = 0.0
    for step, value in enumerate([*visited[1:], last]):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert averaged == pytest.approx(expected, rel=1e-6)


def test_learning_rate_rises_linearly_and_decays_as_a_cosine() -> None:
    config = TrainConfig(14, warmup_steps=4, decay="cosine")
    factors = [config.lr_factor(step) for step in range(14)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[9] == pytest.approx(0.5)
    assert sorted(factors[4:], reverse=True) == factors[4:] and 0 < factors[-1] < 0.03
    assert TrainConfig(4, warmup_steps=4, decay="cosine").lr_factor(4) == 1.0  # asked for after the last step
    assert {TrainConfig(14).lr_factor(step) for step in range(14)} == {1.0}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_targets_follow_the_prediction_type(prediction_type: str) -> None:
    noising = Noising(Schedule(SCHEDULE.betas, prediction_type))
    x0, eps = torch.randn(2, 5, 1, 2, 2)
    t = torch.tensor([0, 1, 10, 500, 999])
    bar = torch.from_numpy(SCHEDULE.alpha_bar)[t].float()[:, None, None, None]
    expected = {"epsilon": eps, "sample": x0, "v_prediction": bar.sqrt() * eps - (1 - bar).sqrt() * x0}
    torch.testing.assert_close(noising.target(x0, eps, t), expected[prediction_type])
    torch.testing.assert_close(noising.noise(x0, eps, t), bar.sqrt() * x0 + (1 - bar).sqrt() * eps)


def test_a_diverging_run_names_its_step() -> None:
    def objective(model: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
        loss: torch.Tensor = (model.factor * 1e30).square() * 1e30
        return loss

    with pytest.raises(FloatingPointError, match="loss must stay finite, got inf at step 0"):
        train(Scaled(1.0), objective, TrainConfig(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"decay": "linear"}, "decay must be one of 'constant', 'cosine'"),
        ({"lr": 0}, "lr must be finite and at least"),
        ({"grad_clip": 0}, "grad_clip must be finite and at least"),
        ({"ema_decay": 1.5}, "ema_decay must be between 0 and 1"),
        ({"grad_clip": float("nan")}, "grad_clip must be finite"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_settings(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 1, **options})
