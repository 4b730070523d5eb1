"""Unlearning runs of one base in one loop against one after another, as LoRA and of all weights.

Each call takes all runs from the base to the trained models, over a few steps: drawing, forward, backward, optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from benchmarks.contenders import architecture
from benchmarks.registry import Benchmark, Case, Contender
from benchmarks.workloads import ARCHITECTURES
from guda_fast import Schedule
from guda_fast.counterfactuals import ReTrackObjective, TrainConfig, TrainResult, train, train_together
from guda_fast.datasets import GroupedImages

IMAGES = 32  # of each group
CONFIGS = {
    "rank 4": TrainConfig(5, lr=1e-4, lora_rank=4),
    "dense": TrainConfig(5, lr=1e-4),
}
Results = Mapping[str, TrainResult | Exception]


def together_case(network: str, form: str, runs: int, batch_size: int, quick: bool) -> Case:
    """K ReTrack runs of as many forget and retain images a step."""
    kind = ARCHITECTURES["tiny" if quick else network]
    base, config = kind.make().eval(), CONFIGS[form]
    labels = torch.arange(runs * IMAGES) % runs
    data = GroupedImages.by_label(
        torch.rand(len(labels), *kind.shape, device="cpu") * 2 - 1, labels.cpu(), [f"group {k}" for k in range(runs)]
    )
    schedule = Schedule.from_scheduler(kind.scheduler())
    objectives = {group: ReTrackObjective(data, group, schedule, batch_size=batch_size) for group in data.groups}

    def one_by_one(number: int) -> Results:
        return {group: train(base, objective, config) for group, objective in objectives.items()}

    def together(number: int) -> Results:
        return train_together(base, objectives, config)

    return Case(
        op="unlearn",
        shapes=f"{network} {form}, K={runs} rows={2 * batch_size}",
        dtype="float32",
        bytes=_bytes(base) * runs * config.steps,
        input_sets=1,
        rival=Contender("one by one", architecture(), one_by_one),
        contenders=[Contender("together", architecture(), together)],
        # A backward costs two forwards, or, with few gradients of weights, a little more than one.
        flop=3 * kind.flop_per_forward() * 2 * batch_size * runs * config.steps if form == "dense" else 0,
        check=lambda: check_agreement(one_by_one(0), together(0)),
    )


def check_agreement(alone: Results, together: Results) -> None:
    """Losses of all steps; those of wrong rows or factors differ by more than a rounding."""
    for group, result in alone.items():
        other = together[group]
        assert isinstance(result, TrainResult) and isinstance(other, TrainResult)
        for ours, theirs in zip(other.losses, result.losses, strict=True):
            assert math.isclose(ours, theirs, rel_tol=1e-4), (group, ours, theirs)


def _bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _cases(quick: bool) -> list[Callable[[], Case]]:
    sizes = [(2, 8)] if quick else [(k, rows) for k in (2, 4, 8, 16) for rows in (8, 64)]
    jobs = [("digits", form, *size) for form in CONFIGS for size in sizes]
    return [partial(together_case, *job, quick) for job in jobs]


BENCHMARK = Benchmark(
    "together", _cases, ("tests/test_lora_training*.py", "tests/test_trainer*.py"), threads=2, repetitions=5
)
