"""The training loop: it learns, repeats itself, leaves its input alone and stops at NaN."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from guda_fast import Schedule
from guda_fast.counterfactuals import DenoisingObjective, ReTrackObjective, Rows, TrainConfig, train
from guda_fast.counterfactuals.noising import Noising
from guda_fast.datasets import load_digits
from tiny import Scaled, tiny_unet
from training import SCHEDULE, Fixed, Noise, changed, constant, distance


@pytest.mark.slow
def test_training_lowers_the_loss_and_leaves_the_model_alone() -> None:
    model = tiny_unet()
    before = copy.deepcopy(model)
    steps: list[tuple[int, int]] = []
    objective = DenoisingObjective(load_digits(), SCHEDULE, batch_size=32)
    result = train(model, objective, TrainConfig(60, lr=3e-3), progress=lambda *done: steps.append(done))
    assert sum(result.losses[-10:]) < 0.6 * sum(result.losses[:10])
    assert steps == [(step, 60) for step in range(1, 61)]
    assert changed(model, before) == [] and not model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not result.model.training
    assert not any(parameter.requires_grad for parameter in result.model.parameters())


def test_a_seed_repeats_a_run_and_another_does_not() -> None:
    objective = DenoisingObjective(load_digits(), SCHEDULE, batch_size=8)

    def losses(seed: int) -> list[float]:
        return list(train(tiny_unet(), objective, TrainConfig(3, seed=seed)).losses)

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_steps_are_those_of_a_plain_loop_in_float64() -> None:
    """Two batches a step, both kinds of rows, warm-up, weight decay, clipping and averaged weights."""
    config = TrainConfig(
        4, lr=1e-3, weight_decay=0.1, warmup_steps=2, decay="cosine", grad_clip=0.5, ema_decay=0.6, seed=3, accumulate=2
    )
    base = tiny_unet().double()
    result = train(base, Noise(), config)

    model, average = copy.deepcopy(base), copy.deepcopy(base)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for step in range(4):
        loss = torch.zeros((), dtype=torch.float64)
        for batch in (Noise().draw(generator) for _ in range(2)):
            for weight, rows in ((1.0, batch.retain), (0.7, batch.forget)):
                for x, t, target in zip(rows.x_t.double(), rows.t, rows.target.double(), strict=True):
                    error = model(x[None], t[None]).sample[0] - target
                    loss = loss + weight * error.square().sum() / rows.x_t.numel() / 2
        optimizer.param_groups[0]["lr"] = 1e-3 * config.lr_factor(step)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([value.grad.square().sum() for value in model.parameters()]).sum().sqrt()
        assert norm > 0.5  # or nothing would be clipped
        for value in model.parameters():
            value.grad *= 0.5 / (norm + 1e-6)
        optimizer.step()
        decay = min(0.6, (1 + step) / (10 + step))
        for mean, value in zip(average.parameters(), model.parameters(), strict=True):
            mean.data = decay * mean.data + (1 - decay) * value.data
        losses.append(loss.item())
    assert list(result.losses) == pytest.approx(losses, rel=1e-12)
    # Adam divides by the gradient's size: a difference of 1e-16 in an element of 1e-8 becomes one of 1e-8 steps.
    assert distance(result.model.parameters(), average.parameters()) < 1e-3 * 1e-6


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


def test_distilled_rows_keep_the_true_target_apart_and_draw_what_standard_ones_draw() -> None:
    data = load_digits()
    rows = {
        retain: DenoisingObjective(data, SCHEDULE, batch_size=4, retain=retain).rows(torch.Generator().manual_seed(1))
        for retain in ("standard", "distill")
    }
    assert torch.equal(rows["distill"].x_t, rows["standard"].x_t)
    assert torch.equal(rows["distill"].true, rows["standard"].target)
    assert rows["standard"].true is None


def test_variance_channels_are_not_trained_on() -> None:
    result = train(tiny_unet(out_channels=2), Noise(), TrainConfig(1))
    assert len(result.losses) == 1 and result.model.config.out_channels == 2


def test_errors_are_reported_apart_and_without_weights() -> None:
    result = train(Scaled(1.0), Fixed(constant(3.0), constant(2.0), 0.25, 0.5), TrainConfig(1))
    assert (result.losses, result.retain_losses, result.forget_losses) == ([0.25 * 4 + 0.5], [4.0], [1.0])
    assert train(Scaled(1.0), Fixed(constant(3.0)), TrainConfig(1)).forget_losses == [None]


def test_a_result_is_saved_with_its_log(tmp_path: Path) -> None:
    result = train(tiny_unet(), Noise(), TrainConfig(2, lr=0.1, warmup_steps=1))
    result.save(tmp_path / "run")
    assert changed(UNet2DModel.from_pretrained(tmp_path / "run"), result.model) == []
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and [line["lr"] for line in lines] == [0.05, 0.1]
    for name, values in (("loss", result.losses), ("retain", result.retain_losses), ("forget", result.forget_losses)):
        assert [line[name] for line in lines] == values
    with pytest.raises(TypeError, match="model must have save_pretrained, got Scaled"):
        train(Scaled(1.0), Noise(), TrainConfig(1)).save(tmp_path / "other")


def test_a_diverging_run_names_its_step() -> None:
    with pytest.raises(FloatingPointError, match="train: the loss must stay finite, got inf at step 0"):
        train(Scaled(1e30), Noise(), TrainConfig(2))


def test_a_gradient_that_is_not_finite_is_never_applied() -> None:
    """Errors of 1e18 on images of 1e25: the loss is 1e36, its gradient 1e43."""
    x_t = torch.full((1, 1, 2, 2), 1e25)
    rows = Rows(x_t, torch.zeros(1, dtype=torch.int64), None, x_t * (1 - 2**-23))
    with pytest.raises(FloatingPointError, match="gradient's norm must stay finite, got inf at step 0"):
        train(Scaled(1.0), Fixed(rows), TrainConfig(2))


def test_a_base_in_half_precision_is_refused() -> None:
    with pytest.raises(TypeError, match="model must have float32 or float64 parameters, got bfloat16"):
        train(Scaled(1.0).bfloat16(), Noise(), TrainConfig(1))


def test_models_are_what_they_were_before_runs_had_students() -> None:
    """The loop of the first release, with the same draws: results that were published are made again bit for bit."""
    config = TrainConfig(5, lr=1e-3, warmup_steps=2, decay="cosine", ema_decay=0.9)
    objective = ReTrackObjective(load_digits(), "3", SCHEDULE, batch_size=4)
    result = train(tiny_unet(), objective, config)

    model, average, losses = tiny_unet().train(), tiny_unet(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, config.lr_factor)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        batch = objective.draw(generator)
        x_t, t = torch.cat([batch.retain.x_t, batch.forget.x_t]), torch.cat([batch.retain.t, batch.forget.t])
        retain, forget = model(x_t, t).sample.split(4)
        loss = (retain - batch.retain.target).square().mean() + 0.3 * (forget - batch.forget.target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        values = [value.detach() for value in model.parameters()]
        torch._foreach_lerp_([mean.detach() for mean in average.parameters()], values, 1 - (1 + step) / (10 + step))
    assert list(result.losses) == losses
    assert changed(result.model, average) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"decay": "linear"}, "decay must be one of 'constant', 'cosine'"),
        ({"precision": "tf32"}, "precision must be one of 'fp32', 'bf16', 'fp16'"),
        ({"trained": "attention"}, "trained must be one of 'all', 'cross-attention'"),
        ({"lr": 0}, "lr must be finite and at least"),
        ({"grad_clip": 0}, "grad_clip must be finite and at least"),
        ({"grad_clip": float("nan")}, "grad_clip must be finite"),
        ({"ema_decay": 1.5}, "ema_decay must be between 0 and 1"),
        ({"saliency": 0.0}, "saliency must be between"),
        ({"retain_bound": 0.9}, "retain_bound must be finite and at least 1"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"lora_rank": 4, "saliency": 0.5}, "saliency must be None with lora_rank"),
        ({"lora_alpha": 4.0}, "lora_alpha must be None without lora_rank"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_settings(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 1, **options})


def test_settings_are_what_json_gives_back() -> None:
    settings = TrainConfig(3, trained=("a*", "b")).settings()
    assert json.loads(json.dumps(settings)) == settings
    with pytest.raises(TypeError, match="trained must be a choice or a tuple of patterns"):
        TrainConfig(3, trained=["a*"])  # type: ignore[arg-type]


def test_numbers_of_other_libraries_are_settings_too(tmp_path: Path) -> None:
    numbers = {"steps": np.int64(2), "lr": np.float32(0.5), "ema_decay": np.float64(0.9), "seed": np.int32(3)}
    config = TrainConfig(**numbers, lora_rank=np.int64(2), lora_alpha=np.float32(2))  # type: ignore[arg-type]
    assert json.loads(json.dumps(config.settings())) == config.settings()
    assert config == TrainConfig(2, lr=0.5, ema_decay=0.9, seed=3, lora_rank=2, lora_alpha=2.0)
    assert train(tiny_unet(), Noise(), TrainConfig(np.int64(1)), work=tmp_path).steps == 1  # type: ignore[arg-type]


def test_seconds_are_those_of_whole_steps() -> None:
    """Also of the optimiser and the looks at the bound, which here take most of the time."""
    times: list[float] = []
    config = TrainConfig(10, retain_bound=100.0, bound_every=1)
    found = train(tiny_unet(), Noise(), config, progress=lambda *_: times.append(time.perf_counter()))
    # All but the first step lie between the first and the last call.
    assert found.seconds > 0.95 * (times[-1] - times[0])
