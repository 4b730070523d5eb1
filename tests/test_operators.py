"""The operators by name: their options, their losses through the trainer, and that each of them unlearns."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from conditional import classed
from guda_fast import Schedule
from guda_fast.counterfactuals import DenoisingObjective, TrainConfig, train
from guda_fast.counterfactuals.operators import OPERATORS, make_objective
from guda_fast.datasets import GroupedImages, load_digits, with_labels
from operator_cases import BATCH, Affine, extreme_schedule, labelled_data, objective_loss

SCHEDULE = Schedule.from_scheduler(DDPMScheduler())
NAMES = ("retrack", "esd", "siss", "erasediff", "redirect")


def test_names_and_defaults_are_those_of_the_design() -> None:
    assert tuple(OPERATORS) == NAMES
    defaults = {name: operator.options for name, operator in OPERATORS.items()}
    assert defaults["retrack"]["mode"] == "paper"
    assert defaults["retrack"]["neighbours"] == 10
    assert defaults["esd"]["guidance"] == 7.5
    assert 0.3 <= defaults["esd"]["weight"] <= 1
    assert defaults["siss"] == {"scale": 1.0, "share": 0.1}
    assert defaults["erasediff"]["weight"] == 1.0
    redirect = {name: defaults["redirect"][name] for name in ("anchors", "beta", "eta", "stability")}
    assert redirect == {"anchors": "weighted_style", "beta": 2.0, "eta": 0.3, "stability": 2.0}


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_settings_that_exist(name: str) -> None:
    operator = OPERATORS[name]
    assert "default" in operator.presets
    for preset in operator.presets.values():
        assert set(preset.options) <= set(operator.options)
        TrainConfig(**{"steps": 1, **preset.training})
        make_objective(name, labelled_data(), "dog", SCHEDULE, **{**preset.options, **_few(name)})


def _few(name: str) -> dict[str, Any]:
    """What small data ask for."""
    return {"neighbours": 3} if name == "retrack" else {}


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_takes_the_loss_of_the_objective(name: str) -> None:
    data, schedule = labelled_data(), extreme_schedule()
    objective = make_objective(name, data, "dog", schedule, batch_size=BATCH, **_few(name))
    found = train(Affine(1), objective, TrainConfig(1, seed=5)).losses[0]
    expected = objective_loss(objective, Affine(1), Affine(1), torch.Generator().manual_seed(5))
    # Sums of 300 products in float32, in another order.
    assert found == pytest.approx(expected.item(), rel=300 * 2**-24)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_repeats_the_rows(name: str) -> None:
    objective = make_objective(name, labelled_data(), "dog", extreme_schedule(), batch_size=BATCH, **_few(name))
    first, second, other = (objective.draw(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.forget is not None and second.forget is not None and other.forget is not None
    assert torch.equal(first.forget.x_t, second.forget.x_t)
    assert torch.equal(first.retain.x_t, second.retain.x_t)
    assert not torch.equal(first.forget.x_t, other.forget.x_t)


def test_errors() -> None:
    data, schedule = labelled_data(), extreme_schedule()
    with pytest.raises(ValueError, match="name must be one of 'retrack', 'esd', 'siss', 'erasediff', 'redirect', got"):
        make_objective("forget", data, "dog", schedule)
    with pytest.raises(ValueError, match="options of siss must be among scale, share, got weight, lr"):
        make_objective("siss", data, "dog", schedule, weight=1, scale=1, lr=1)
    with pytest.raises(ValueError, match="group must be one of cat, dog, eel, got 'fox'"):
        make_objective("siss", data, "fox", schedule)
    for name in ("esd", "redirect"):
        with pytest.raises(ValueError, match="data must have conditions, got those of an unconditional model"):
            make_objective(name, replace(data, conditions=None, null=None), "dog", schedule)


def three_digits() -> GroupedImages:
    """0, 1 and 2 with their labels, and a label for none: what the small conditional UNet takes."""
    digits = load_digits()
    index = torch.cat([digits.group(name) for name in "012"])
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([len(digits.group(name)) for name in "012"]))
    return with_labels(GroupedImages.by_label(digits.images[index], labels, tuple("012")), null=True)


@cache
def trained_base() -> nn.Module:
    """A model of three digits that has also seen each image without its label."""
    data = three_digits()
    assert data.conditions is not None and data.null is not None
    row = torch.cat([data.conditions.row, torch.full((len(data),), data.null)])
    both = replace(data, images=data.images.repeat(2, 1, 1, 1), conditions=replace(data.conditions, row=row))
    config = TrainConfig(500, lr=3e-3, ema_decay=0.98)
    return train(classed(channels=1), DenoisingObjective(both, SCHEDULE, batch_size=48), config).model


@torch.no_grad()
def loss_on(model: nn.Module, index: Tensor) -> float:
    """The ordinary loss over 4,096 draws that are the same for every model."""
    data = three_digits()
    assert data.conditions is not None
    objective = DenoisingObjective(data, SCHEDULE, index, batch_size=512)
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(8):
        rows = objective.rows(generator)
        assert rows.condition is not None and isinstance(rows.target, Tensor)
        prediction = model(rows.x_t, rows.t, **data.conditions.take(rows.condition))[0]
        total += float((prediction - rows.target).square().mean())
    return total / 8


# A network of so few parameters keeps the rest under small rates and, for EraseDiff, a small weight. SISS forgets a
# third of the data here: the loss over all of them would win against a forget gradient of a tenth.
SMALL_STEPS: dict[str, tuple[float, dict[str, Any]]] = {
    "retrack": (3e-5, {}),
    "esd": (1e-4, {}),
    "siss": (3e-4, {"share": 1.0}),
    "erasediff": (1e-4, {"weight": 0.03}),
    "redirect": (3e-4, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_unlearning_raises_the_groups_loss_and_keeps_the_rests(name: str) -> None:
    data, base = three_digits(), trained_base()
    lr, options = SMALL_STEPS[name]
    objective = make_objective(name, data, "0", SCHEDULE, batch_size=32, **options)
    unlearned = train(base, objective, TrainConfig(60, lr=lr)).model
    forgotten, retained = (
        loss_on(unlearned, index) / loss_on(base, index) - 1 for index in (data.group("0"), data.rest("0"))
    )
    assert forgotten > 0.05 > abs(retained)
    # A change that does not know the group would raise both alike.
    assert forgotten > 5 * abs(retained)
