"""The benchmark of ReTrack's step: its loops make the same batches and the same gradient."""

from __future__ import annotations

import pytest
import torch

from benchmarks.retrack_step import LoopedReTrack, draw_case, step_case
from guda_fast.counterfactuals import ReTrackObjective, TrainConfig, train
from guda_fast.datasets import GroupedImages
from operator_cases import extreme_schedule
from tiny import Scaled


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 8, 8)])
def test_loops_draw_the_same(shape: tuple[int, int, int]) -> None:
    case = draw_case(shape, quick=True)
    assert case.check is not None
    case.check()
    for contender in (case.rival, *case.contenders):
        contender.call(0)


def test_steps_run() -> None:
    case = step_case(quick=True)
    assert case.check is not None
    case.check()
    for contender in (case.rival, *case.contenders):
        contender.call(0)


def test_losses_of_a_run_are_the_same() -> None:
    images = torch.rand((12, 1, 4, 4), generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = GroupedImages(images, {"cat": torch.arange(4)})
    losses = [
        train(Scaled(0.5), made(data, "cat", extreme_schedule(), batch_size=8, neighbours=3), TrainConfig(4)).losses
        for made in (ReTrackObjective, LoopedReTrack)
    ]
    # Targets of 1e2 from differences in float32: 2^-24 of 1e4 for each square.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
