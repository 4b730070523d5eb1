"""What a series would cost, from a few steps of its first run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guda_fast.counterfactuals.objective import FromBase, Objective
from guda_fast.counterfactuals.recipes import Series
from guda_fast.counterfactuals.result import TrainResult
from guda_fast.counterfactuals.selection import selected
from guda_fast.counterfactuals.trainer import train_together

_MEASURED = 3  # steps, after one that warms up


@dataclass(frozen=True)
class Cost:
    """Of all runs of a series that are left.

    runs, steps: optimiser steps of all runs. rows: images that go forward and back through the models in training.
    base_rows: images that go forward through the frozen base. flop: of all steps, and of what a run does once, such as
    a saliency mask; of the looks of a retain bound, one a run.
    state_bytes: of one process: weights of base and students; gradients, AdamW's moments and averages of what changes.
    activation_bytes: of one process, what a backward pass needs kept. seconds: wall time.
    """

    runs: int
    steps: int
    rows: int
    base_rows: int
    flop: float
    state_bytes: int
    activation_bytes: int
    seconds: float


def measured(series: Series, names: Sequence[str], *, device: str = "cpu", together: int = 1, devices: int = 1) -> Cost:
    """The cost of the runs ``names`` of a series, each step of which is taken to be like the first ones.

    together: runs in one loop [>= 1]. devices: processes, which are taken not to disturb each other [>= 1].
    """
    begin = time.perf_counter()
    objectives = {name: series.objective(name) for name in names[:together]}
    preparing = (time.perf_counter() - begin) / len(objectives)
    rows, base_rows = zip(*map(_rows, objectives.values()), strict=True)
    first = _counted(series, objectives, device, 1)
    flop = _counted(series, objectives, device, 2).flop - first.flop
    seconds = _timed(series, objectives, device)
    count = len(objectives)
    steps = sum(series.config(name).steps for name in names)
    accumulated = series.config(names[0]).accumulate
    return Cost(
        runs=len(names),
        steps=steps,
        rows=steps * accumulated * sum(rows) // count,
        base_rows=steps * accumulated * sum(base_rows) // count,
        flop=(flop * steps + (first.flop - flop) * len(names)) / count,
        state_bytes=_state_bytes(series, names[0], first.results),
        activation_bytes=first.kept,
        seconds=(seconds * steps / count + preparing * len(names)) / devices,
    )


def _rows(objective: Objective) -> tuple[int, int]:
    """Images a batch through the student, and through the frozen base."""
    batch = objective.draw(torch.Generator().manual_seed(0))
    parts = [part for part in (batch.retain, batch.forget) if part is not None]
    targets = [(part, part.target) for part in parts]
    asked = sum(len(part.t) * len(target.scales) for part, target in targets if isinstance(target, FromBase))
    return sum(len(part.t) for part in parts), asked


class _Counted(NamedTuple):
    """Multiplications and additions as far as torch counts them, bytes kept for a backward pass, and what was made."""

    flop: float
    kept: int
    results: Sequence[TrainResult]


def _counted(series: Series, objectives: dict[str, Objective], device: str, steps: int) -> _Counted:
    # Imports triton, which must not come before a caller has said whether to interpret it.
    from torch.utils.flop_counter import FlopCounterMode

    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda given: given):
        results = _train(series, objectives, device, steps)
    return _Counted(float(counter.get_total_flops()), sum(kept.values()), results)


def _timed(series: Series, objectives: dict[str, Objective], device: str) -> float:
    """Seconds of a step of all these runs."""
    times: list[float] = []
    _train(series, objectives, device, 1 + _MEASURED, lambda *_: times.append(time.perf_counter()))
    return (times[-1] - times[len(objectives) - 1]) / _MEASURED


def _train(
    series: Series, objectives: dict[str, Objective], device: str, steps: int, progress: Any = None
) -> list[TrainResult]:
    config = replace(series.config(next(iter(objectives))), steps=steps)
    results = []
    for result in train_together(series.start, objectives, config, device=device, progress=progress).values():
        if isinstance(result, Exception):
            raise result
        results.append(result)
    return results


def _state_bytes(series: Series, name: str, results: Sequence[TrainResult]) -> int:
    config = series.config(name)
    weights = sum(tensor.nbytes for tensor in (*series.start.parameters(), *series.start.buffers()))
    parameters = dict(series.start.named_parameters())
    # Gradients, two moments, and the average.
    each, total = 3 + (config.ema_decay is not None), weights
    for result in results:
        if result.factors is None:
            total += weights + each * sum(parameters[key].nbytes for key in selected(series.start, config.trained))
        else:  # the base is shared
            total += (1 + each) * sum(factor.nbytes for factors in result.factors.values() for factor in factors)
    return total
