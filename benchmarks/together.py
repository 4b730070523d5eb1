"""Unlearning runs of one base in one loop against one after another, as LoRA and of all weights.

Each call takes all runs from the base to the trained models, over a few steps: drawing, forward, backward, optimiser.
On a CPU runs of all weights share no forward, so that together is as one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks.contenders import architecture
from benchmarks.registry import Benchmark, Case, Contender
from benchmarks.workloads import ARCHITECTURES
from guda_fast import Schedule
from guda_fast.counterfactuals import ReTrackObjective, TrainConfig, TrainResult, train, train_together
from guda_fast.datasets import GroupedImages

IMAGES = 32  # of each group
STEPS = 5
CONFIGS = {"rank 4": TrainConfig(STEPS, lr=1e-4, lora_rank=4), "dense": TrainConfig(STEPS, lr=1e-4)}
Results = Mapping[str, TrainResult | Exception]


def together_case(network: str, runs: int, batch_size: int, quick: bool) -> Case:
    """K ReTrack runs of as many forget and retain images a step."""
    kind = ARCHITECTURES["tiny" if quick else network]
    base = kind.make().eval()
    labels = torch.arange(runs * IMAGES, device="cpu") % runs
    images = torch.rand(len(labels), *kind.shape, device="cpu") * 2 - 1
    data = GroupedImages.by_label(images, labels, [f"group {k}" for k in range(runs)])
    schedule = Schedule.from_scheduler(kind.scheduler())
    objectives = {group: ReTrackObjective(data, group, schedule, batch_size=batch_size) for group in data.groups}

    def one_by_one(config: TrainConfig) -> Results:
        return {group: train(base, objective, config) for group, objective in objectives.items()}

    def together(config: TrainConfig) -> Results:
        return train_together(base, objectives, config)

    def check() -> None:
        for config in CONFIGS.values():
            check_agreement(one_by_one(config), together(config))

    rival, *contenders = (
        Contender(f"{form}, {name}", architecture(), lambda _, run=run, config=config: run(config))  # type: ignore[misc]
        for form, config in CONFIGS.items()
        for name, run in (("one by one", one_by_one), ("together", together))
    )
    return Case(
        op="unlearn",
        shapes=f"{network} K={runs} rows={2 * batch_size}",
        dtype="float32",
        bytes=sum(parameter.nbytes for parameter in base.parameters()) * runs * STEPS,
        input_sets=1,
        rival=rival,
        contenders=contenders,
        check=check,
    )


def check_agreement(alone: Results, together: Results) -> None:
    """Losses of all steps; those of wrong rows or factors differ by more than a rounding."""
    for group, result in alone.items():
        other = together[group]
        assert isinstance(result, TrainResult) and isinstance(other, TrainResult)
        for ours, theirs in zip(other.losses, result.losses, strict=True):
            assert math.isclose(ours, theirs, rel_tol=1e-4), (group, ours, theirs)


def _cases(quick: bool) -> list[Callable[[], Case]]:
    sizes = [(2, 8)] if quick else [(k, rows) for k in (2, 4, 8) for rows in (8, 64)]
    return [partial(together_case, "digits", *size, quick) for size in sizes]


BENCHMARK = Benchmark(
    "together", _cases, ("tests/test_lora_training*.py", "tests/test_trainer*.py"), threads=2, repetitions=5
)
