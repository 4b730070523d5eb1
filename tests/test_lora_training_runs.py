"""LoRA runs through the trainer: together as alone, each with its own end, saved as adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from conditional import classed
from guda_fast import Schedule
from guda_fast.counterfactuals import (
    Batch,
    DenoisingObjective,
    FromBase,
    ReTrackObjective,
    Rows,
    TrainConfig,
    TrainResult,
    train,
    train_together,
)
from guda_fast.datasets import GroupedImages
from guda_fast.deltas import DeltaBank
from guda_fast.diffusion.conditions import Conditions
from tiny import perturbed, tiny_unet

SCHEDULE = Schedule.from_scheduler(DDPMScheduler())
GROUPS = ("cat", "dog", "owl")


def data(channels: int = 1, conditions: bool = False) -> GroupedImages:
    labels = torch.arange(24) % 3
    images = torch.rand(24, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given = Conditions({"class_labels": torch.arange(3)}, labels) if conditions else None
    return GroupedImages.by_label(images, labels, GROUPS, given)


def retracking(group: str) -> ReTrackObjective:
    return ReTrackObjective(data(), group, SCHEDULE, batch_size=2 + len(group) % 2, neighbours=3)


class ToTheNextLabel:
    """The ordinary loss on all images, and for a group's what the base predicts under the next label, and its own."""

    retain_weight, forget_weight = 1.0, 0.7

    def __init__(self, group: int, share: float | None) -> None:
        images = data(4, conditions=True)
        self.all = DenoisingObjective(images, SCHEDULE, batch_size=3)
        self.own = DenoisingObjective(images, SCHEDULE, images.group(GROUPS[group]), batch_size=2)
        self.conditions, self.forget_share = images.conditions, share

    def draw(self, generator: torch.Generator) -> Batch:
        retain, own = self.all.rows(generator), self.own.rows(generator)
        assert own.condition is not None
        target = FromBase((1.0, -0.5), ((own.condition + 1) % 3, None))
        return Batch(retain, Rows(own.x_t, own.t, own.condition, target))


def trained(found: TrainResult | Exception) -> TrainResult:
    assert isinstance(found, TrainResult)
    return found


@pytest.mark.parametrize("share", [None, 0.1])
def test_conditional_runs_together_are_as_alone(share: float | None) -> None:
    base = classed().double()
    config = TrainConfig(3, lr=1e-3, lora_rank=2, accumulate=2, ema_decay=0.9)
    objectives = {group: ToTheNextLabel(k, share) for k, group in enumerate(GROUPS)}
    together = train_together(base, objectives, config)
    for group, objective in objectives.items():
        alone, other = train(base, objective, config), trained(together[group])
        # float64, whose roundings Adam's first steps enlarge by 1 / eps = 1e8 where a gradient is nearly zero.
        assert other.losses == pytest.approx(alone.losses, rel=1e-6)
        for ours, theirs in zip(other.model.parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    models = [trained(found).model.state_dict() for found in together.values()]
    assert not torch.equal(models[0]["conv_in.weight"], models[1]["conv_in.weight"])


def test_a_run_that_diverges_leaves_the_others_alone() -> None:
    class Spoiled(ReTrackObjective):
        draws = 0

        def draw(self, generator: torch.Generator) -> Batch:
            self.draws += 1
            batch = super().draw(generator)
            return Batch(batch.retain, None) if self.draws < 2 else _spoiled(batch)

    base, config = perturbed(tiny_unet(), 0.05).double(), TrainConfig(3, lr=1e-3, lora_rank=2)
    spoiled = Spoiled(data(), "owl", SCHEDULE, batch_size=2, neighbours=3)
    found = train_together(base, {"cat": retracking("cat"), "owl": spoiled, "dog": retracking("dog")}, config)
    assert isinstance(found["owl"], FloatingPointError)
    assert "owl: the loss must stay finite, got nan at step 1" in str(found["owl"])
    for group in ("cat", "dog"):
        alone = train(base, retracking(group), config)
        assert trained(found[group]).losses == pytest.approx(alone.losses, rel=1e-6)


def _spoiled(batch: Batch) -> Batch:
    rows = batch.retain
    return Batch(Rows(rows.x_t * torch.nan, rows.t, rows.condition, rows.target), batch.forget)


def test_a_run_is_saved_as_the_adapter_of_its_model(tmp_path: Path) -> None:
    base = perturbed(tiny_unet(), 0.05)
    config = TrainConfig(2, lr=1e-2, lora_rank=2, lora_alpha=5.0, ema_decay=0.5)
    result = train(base, retracking("cat"), config)
    result.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "log.jsonl"
    }  # fmt: skip
    ours = result.model.state_dict()
    with DeltaBank.load(base, {"cat": tmp_path}).applied("cat") as model:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, ours[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(ours["conv_out.weight"], base.state_dict()["conv_out.weight"])


def test_runs_go_on_from_their_checkpoints(tmp_path: Path) -> None:
    """Stopped by an error at the same step, as Ctrl-C does it, and begun again."""
    base, config = perturbed(tiny_unet(), 0.05), TrainConfig(4, lr=1e-3, lora_rank=2, ema_decay=0.5)
    objectives = {group: retracking(group) for group in GROUPS}
    whole = train_together(base, objectives, config)
    work = {group: tmp_path / group for group in GROUPS}

    def stop(run: str, done: int, total: int) -> None:
        if (run, done) == (GROUPS[-1], 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_together(base, objectives, config, work=work, checkpoint_every=2, progress=stop)
    resumed = train_together(base, objectives, config, work=work, checkpoint_every=2)
    for group in GROUPS:
        ours, theirs = trained(resumed[group]), trained(whole[group])
        assert ours.losses == theirs.losses
        for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            assert torch.equal(one, other)


def test_bf16_trains_the_factors_in_float32() -> None:
    base, config = perturbed(tiny_unet(), 0.05), TrainConfig(2, lr=1e-3, lora_rank=2, precision="bf16")
    result = train(base, retracking("cat"), config)
    exact = train(base, retracking("cat"), TrainConfig(2, lr=1e-3, lora_rank=2))
    assert result.losses == pytest.approx(exact.losses, rel=0.02)
    assert result.losses != exact.losses
    assert {value.dtype for value in result.model.parameters()} == {torch.float32}
