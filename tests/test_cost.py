"""What a series would cost: work that is done once counts once, and only what changes has gradients and moments."""

from __future__ import annotations

import pytest

from guda_fast.counterfactuals.cost import Cost, measured
from guda_fast.counterfactuals.recipes import Unlearning, UnlearningRecipe
from series import random_groups
from tiny import tiny_unet

SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 50}
STEPS, GROUPS = 100, ("a", "b")


def cost(**options: object) -> Cost:
    """Of two groups, one after another."""
    recipe = UnlearningRecipe("retrack", steps=STEPS, batch_size=4, options={"neighbours": 2, **options})
    return measured(Unlearning(random_groups(), tiny_unet(), recipe, GROUPS, scheduler=SCHEDULER), GROUPS)


def test_flop_grow_by_what_a_run_does_once() -> None:
    plain = cost()
    assert plain.runs == 2 and plain.steps == 2 * STEPS and plain.rows == 8 * plain.steps
    a_step = plain.flop / plain.steps
    # Eight draws forward and back; a look takes eight retain halves forward, of the base and the model.
    assert 0 < cost(saliency=0.5).flop - plain.flop < 2 * 9 * a_step
    assert 0 < cost(retain_bound=2.0).flop - plain.flop < 2 * 9 * a_step


def test_state_is_of_what_changes() -> None:
    weights = sum(parameter.nbytes for parameter in tiny_unet().parameters())
    assert cost().state_bytes == (1 + 4) * weights
    assert cost(ema_decay=0.9).state_bytes == (1 + 5) * weights
    norms = sum(value.nbytes for name, value in tiny_unet().named_parameters() if "norm" in name)
    assert cost(trained=("*norm*",)).state_bytes == 2 * weights + 3 * norms


def test_lora_shares_the_base() -> None:
    weights = sum(parameter.nbytes for parameter in tiny_unet().parameters())
    narrow, wide = (cost(lora_rank=rank).state_bytes - weights for rank in (1, 2))
    assert narrow > 0 and wide == pytest.approx(2 * narrow)
