"""Runs in one loop are what they are alone; what the frozen base predicts is what a plain loop gets from it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conditional import CLASSES, MODELS, classed, conditions_of
from guda_fast.counterfactuals import (
    Batch,
    DenoisingObjective,
    FromBase,
    Objective,
    ReTrackObjective,
    Rows,
    TrainConfig,
    train,
    train_together,
)
from guda_fast.counterfactuals.frozen import FrozenBase
from guda_fast.datasets import GroupedImages, load_digits
from guda_fast.diffusion.conditions import Conditions
from tiny import Scaled, tiny_unet
from training import SCHEDULE, Dropping, Fixed, Noise, assert_equal, changed, constant, distance

CPU = torch.device("cpu")
EVERYTHING = TrainConfig(
    4, lr=1e-3, weight_decay=0.1, warmup_steps=2, ema_decay=0.9, accumulate=2, saliency=0.4, retain_bound=9.0
)


def objectives() -> dict[str, Objective]:
    data = load_digits()
    return {
        "retrack": ReTrackObjective(data, "3", SCHEDULE, batch_size=4),
        "distilled": ReTrackObjective(data, "5", SCHEDULE, batch_size=3, retain="distill"),
        "shared": Noise(forget_share=0.1),
    }


@pytest.mark.parametrize("config", [TrainConfig(3), EVERYTHING], ids=["plain", "everything"])
def test_runs_together_are_bit_for_bit_what_they_are_alone(config: TrainConfig) -> None:
    base = tiny_unet()
    before, heard = copy.deepcopy(base), []
    found = train_together(base, objectives(), config, progress=lambda *event: heard.append(event))
    assert list(found) == list(objectives()) and changed(base, before) == []
    assert heard == [(name, step, config.steps) for step in range(1, config.steps + 1) for name in found]
    for name, objective in objectives().items():
        assert_equal(found[name], train(base, objective, config))


def test_dropout_is_the_same_together_and_alone() -> None:
    found = train_together(Dropping(1.0), {"a": Noise(), "b": Noise(retain=0.2)}, TrainConfig(3))
    assert_equal(found["b"], train(Dropping(1.0), Noise(retain=0.2), TrainConfig(3)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lora_runs_together_are_what_they_are_alone_to_rounding(accumulate: int) -> None:
    base = tiny_unet().double()
    config = TrainConfig(3, lr=1e-3, lora_rank=2, lora_alpha=4, ema_decay=0.5, accumulate=accumulate)
    found = train_together(base, objectives(), config)
    for name, objective in objectives().items():
        alone = train(base, objective, config)
        assert list(found[name].losses) == pytest.approx(list(alone.losses), rel=1e-12)
        assert distance(found[name].model.parameters(), alone.model.parameters()) < 1e-3 * 1e-6
        assert changed(alone.model, base) != [] and alone.factors


def test_a_run_that_diverges_or_stops_early_does_not_end_the_others() -> None:
    runs = {
        "diverging": Fixed(constant(1e30)),
        "stopping": Fixed(constant(0.9), constant(9.0), 0.0, 1.0),
        "steady": Fixed(constant(0.5)),
    }
    config = TrainConfig(6, lr=0.01, retain_bound=1.5, bound_every=1)
    found = train_together(Scaled(1.0), runs, config)
    assert isinstance(found["diverging"], FloatingPointError)
    assert str(found["diverging"]) == "train: diverging: the loss must stay finite, got inf at step 0"
    assert found["stopping"].stopped is not None and found["stopping"].steps == 2
    assert found["steady"].steps == 6
    assert_equal(found["steady"], train(Scaled(1.0), runs["steady"], config))


def test_a_lora_run_that_diverges_leaves_the_others_as_they_are_without_it() -> None:
    base, good = tiny_unet().double(), Noise()
    bad = Noise(retain=float("nan"))
    config = TrainConfig(2, lora_rank=2)
    found = train_together(base, {"bad": bad, "good": good}, config)
    assert isinstance(found["bad"], FloatingPointError)
    assert list(found["good"].losses) == pytest.approx(list(train(base, good, config).losses), rel=1e-12)


@torch.no_grad()
def plain_target(model: nn.Module, rows: Rows, conditions: Conditions | None) -> Tensor:
    """sum_j scale_j eps_0(x_t, t, condition_j), image by image."""
    images = []
    for i, x_t in enumerate(rows.x_t):
        total = torch.zeros_like(x_t)
        for scale, term in zip(rows.target.scales, rows.target.conditions, strict=True):
            row = rows.condition if term is None else term
            given = {} if conditions is None else conditions.take(row[i : i + 1])
            total += scale * model(x_t[None], timestep=rows.t[i : i + 1], **given, return_dict=False)[0][0]
        images.append(total)
    return torch.stack(images)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_bases_predictions_are_those_of_a_plain_loop(name: str, shared: bool) -> None:
    """Two runs with rows of both kinds; in float64, so that rounding of 1e-16 is all that may differ."""
    model = MODELS[name]().double()
    conditions = conditions_of(name, [0]).to(CPU, torch.float64)
    random = torch.Generator().manual_seed(1)

    def rows(count: int, target: Tensor | FromBase) -> Rows:
        x_t = torch.randn(count, 4, 8, 8, generator=random, dtype=torch.float64)
        return Rows(x_t, torch.arange(count) * 300, torch.arange(count) % 3, target)

    guided = FromBase((8.5, -7.5), (None, torch.tensor([2, 2, 0])))
    own = torch.ones(2, 4, 8, 8, dtype=torch.float64)
    asked = {"a": [rows(2, own), rows(3, guided)], "b": [rows(1, FromBase())], "c": [rows(2, own)]}
    found = FrozenBase(model, CPU, shared=shared).targets(asked, dict.fromkeys(asked, conditions))
    assert found["a"][0] is own and found["c"][0] is own
    for run, number in (("a", 1), ("b", 0)):
        expected = plain_target(model, asked[run][number], conditions)
        torch.testing.assert_close(found[run][number], expected, rtol=1e-11, atol=1e-11)


def test_a_distilled_base_is_already_at_its_target() -> None:
    objective = DenoisingObjective(load_digits(), SCHEDULE, batch_size=4, retain="distill")
    result = train(tiny_unet(), objective, TrainConfig(1))
    assert result.losses == [pytest.approx(0, abs=1e-12)]


def test_a_class_conditional_model_is_trained_on_the_classes_of_its_images() -> None:
    """The first loss against a plain loop; a wrong or missing class would change it."""
    digits = load_digits()
    images = digits.images[:200]
    labels = torch.arange(200) % CLASSES
    conditions = Conditions({"class_labels": torch.arange(CLASSES)}, labels)
    data = GroupedImages.by_label(images, labels, [str(k) for k in range(CLASSES)], conditions)
    base = classed(1).double()
    objective = DenoisingObjective(data, SCHEDULE, batch_size=6)
    found = train(base, objective, TrainConfig(1)).losses[0]

    rows = objective.rows(torch.Generator().manual_seed(0))
    errors = [
        base(rows.x_t[i : i + 1].double(), rows.t[i : i + 1], class_labels=rows.condition[i : i + 1]).sample[0]
        - rows.target[i]
        for i in range(6)
    ]
    assert found == pytest.approx(torch.stack(errors).square().mean().item(), rel=1e-12)
    assert len(set(rows.condition.tolist())) > 1


def test_no_runs_are_no_results() -> None:
    assert train_together(Scaled(1.0), {}, TrainConfig(1)) == {}


def test_bad_arguments() -> None:
    runs = {"a": Noise(), "b": Noise()}
    for work in ({"a": "x"}, {"a": "x", "b": "y/../x/."}, {"a": "x", "b": "x"}):
        paths = {name: Path(folder) for name, folder in work.items()}
        with pytest.raises(ValueError, match="work must have a folder of its own for each run"):
            train_together(Scaled(1.0), runs, TrainConfig(1), work=paths)
    with pytest.raises(ValueError, match="identity must be of runs in objectives"):
        train_together(Scaled(1.0), runs, TrainConfig(1), identity={"c": ""})
    with pytest.raises(TypeError, match="config must be a TrainConfig"):
        train(Scaled(1.0), Noise(), {"steps": 1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1"):
        train(Scaled(1.0), Noise(), TrainConfig(1), checkpoint_every=0)


@dataclass
class Broken(Noise):
    """Its second draw fails."""

    drawn: int = 0

    def draw(self, generator: torch.Generator) -> Batch:
        self.drawn += 1
        if self.drawn == 2:
            raise ValueError("no second draw")
        return super().draw(generator)


@pytest.mark.parametrize("config", [TrainConfig(3), TrainConfig(2, accumulate=2)])
def test_a_run_whose_draw_fails_ends_and_no_other(config: TrainConfig) -> None:
    found = train_together(tiny_unet(), {"bad": Broken(), "good": Noise()}, config)
    assert isinstance(found["bad"], ValueError) and "no second draw" in str(found["bad"])
    assert_equal(found["good"], train(tiny_unet(), Noise(), config))


def test_a_run_that_cannot_begin_or_write_its_log_ends_and_no_other(tmp_path: Path) -> None:
    config = TrainConfig(2, saliency=0.5)
    work = {name: tmp_path / name for name in ("nothing", "full", "good")}

    def fill(name: str, done: int, _: int) -> None:
        if (name, done) == ("full", 1):
            (work["full"] / "log.jsonl").unlink()
            (work["full"] / "log.jsonl").mkdir()

    runs = {"nothing": Noise(forget=None), "full": Noise(), "good": Noise()}
    found = train_together(tiny_unet(), runs, config, work=work, progress=fill)
    assert isinstance(found["nothing"], ValueError) and "saliency" in str(found["nothing"])
    assert isinstance(found["full"], OSError)
    assert_equal(found["good"], train(tiny_unet(), Noise(), config))


class Noisy(Scaled):
    """Draws from the global generator while it is trained, as DiT does to leave out labels."""

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        noise = torch.rand(sample.shape) if self.training else torch.zeros(sample.shape)
        return (self.factor * (sample + noise),)


@pytest.mark.parametrize("config", [TrainConfig(3), TrainConfig(3, saliency=1.0)])
def test_what_a_model_draws_is_the_runs_own(config: TrainConfig) -> None:
    torch.manual_seed(0)
    expected = train(Noisy(1.0), Noise(), config)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = train_together(Noisy(1.0), {"first": Noise(), "second": Noise()}, config)
    assert torch.equal(torch.get_rng_state(), before)
    for name in found:
        assert_equal(found[name], expected)
    assert expected.losses != train(Scaled(1.0), Noise(), config).losses


def test_lora_runs_of_a_base_with_dropout_do_not_depend_on_their_company() -> None:
    base = tiny_unet()
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert any(isinstance(module, torch.nn.Dropout) for module in base.modules())
    config = TrainConfig(3, lora_rank=2)
    alone = train(base, Noise(), config)
    found = train_together(base, {"a": Noise(retain=0.2), "b": Noise()}, config)["b"]
    assert found.losses == pytest.approx(alone.losses, rel=1e-5)  # float32 in another order
    # A base in eval mode: as if nothing could be left out.
    assert_equal(alone, train(tiny_unet(), Noise(), config))


def test_terms_of_the_bases_predictions_are_combined_in_full_precision() -> None:
    """8.5 and -7.5 times predictions of bfloat16, which that type would round to 8 bits once more."""
    x_t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = Rows(x_t, torch.arange(4), None, FromBase((8.5, -7.5), (None, None)))
    frozen = FrozenBase(tiny_unet(), torch.device("cpu"), shared=False)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        (found,) = frozen.targets({"a": [rows]}, {"a": None})["a"]
        prediction = frozen.model(torch.cat([x_t, x_t]), timestep=torch.arange(4).repeat(2), return_dict=False)[0]
    assert prediction.dtype == torch.bfloat16 and found.dtype == torch.float32
    one, other = prediction.float().split(4)
    assert torch.equal(found, 8.5 * one + -7.5 * other)
