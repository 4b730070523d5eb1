"""gf.unlearn: a work folder goes on with its own run and gives no other one's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DDPMScheduler

from guda_fast.counterfactuals import TrainResult
from guda_fast.counterfactuals.unlearn import unlearn
from guda_fast.datasets import load_digits
from guda_fast.errors import CheckpointError
from tiny import tiny_unet
from training import assert_equal


def unlearned(operator: str, group: str, work: Path) -> TrainResult:
    # The presets of the two operators are made equal, so that nothing but the operator tells them apart.
    options = {"lr": 1e-3, "grad_clip": 1.0, "steps": 2, "batch_size": 4}
    return unlearn(operator, tiny_unet(), load_digits(), group=group, scheduler=DDPMScheduler(), work=work, **options)


@pytest.mark.parametrize(
    ("operator", "group", "message"),
    [
        ("retrack", "5", "identity.group: wanted '5'.*, found '3'"),
        ("erasediff", "3", "identity.operator: wanted 'erasediff'.*, found 'retrack'"),
    ],
)
def test_a_work_folder_is_of_one_group_and_operator(operator: str, group: str, message: str, tmp_path: Path) -> None:
    first = unlearned("retrack", "3", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        unlearned(operator, group, tmp_path)
    assert_equal(unlearned("retrack", "3", tmp_path), first)
