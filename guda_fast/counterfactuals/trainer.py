"""One training loop for everything: base models, LOGO retraining and every unlearning operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from guda_fast._validate import check_int
from guda_fast.counterfactuals.config import TrainConfig
from guda_fast.counterfactuals.frozen import FrozenBase, concatenated, inputs_of
from guda_fast.counterfactuals.objective import Objective
from guda_fast.counterfactuals.result import TrainResult
from guda_fast.counterfactuals.run import Run
from guda_fast.counterfactuals.selection import selected
from guda_fast.counterfactuals.students import DenseStudents

__all__ = ["ProgressCallback", "TogetherCallback", "TrainConfig", "TrainResult", "train", "train_together"]

ProgressCallback = Callable[[int, int], object]
"""Called with (steps done, steps in all)."""
TogetherCallback = Callable[[str, int, int], object]
"""Called with (run, its steps done, its steps in all)."""
_ALONE = "run"


def train(
    model: nn.Module,
    objective: Objective,
    config: TrainConfig,
    *,
    device: torch.device | str | None = None,
    work: Path | None = None,
    identity: str = "",
    checkpoint_every: int = 100,
    progress: ProgressCallback | None = None,
) -> TrainResult:
    """Minimise ``objective`` with AdamW, starting from a copy of ``model``, which stays as it is.

    model: any diffusers denoiser. objective: draws its own batches. device: [the model's].
    work: a folder for the checkpoint and the log, from which the same call goes on after it was killed.
    identity: what else the run depends on, such as its data: a checkpoint of another one is refused.
    checkpoint_every: steps from one checkpoint to the next [>= 1]. progress: called after every step.

    Returns the trained copy and its losses. Raises FloatingPointError, naming the step, when the loss is no
    longer finite, or when the weights at the end are not.
    """
    (found,) = train_together(
        model,
        {_ALONE: objective},
        config,
        device=device,
        work=None if work is None else {_ALONE: work},
        identity={_ALONE: identity},
        checkpoint_every=checkpoint_every,
        progress=None if progress is None else lambda _, done, total: progress(done, total),
    ).values()
    if isinstance(found, Exception):
        raise found
    return found


def train_together(
    model: nn.Module,
    objectives: Mapping[str, Objective],
    config: TrainConfig,
    *,
    device: torch.device | str | None = None,
    work: Mapping[str, Path] | None = None,
    identity: Mapping[str, str] | None = None,
    checkpoint_every: int = 100,
    progress: TogetherCallback | None = None,
) -> dict[str, TrainResult | Exception]:
    """Several runs in one loop; each is what ``train`` makes of its objective alone.

    objectives, work, identity: by the name of the run. progress: called after every step of every run.

    Returns for each run what it gives, or the exception that ended it; the others then go on.
    """
    check_int("train", "checkpoint_every", checkpoint_every, 1)
    parameter = next(model.parameters())
    place = parameter.device if device is None else torch.device(device)
    base = FrozenBase(model, place, shared=place.type != "cpu")
    loop = _Loop(base)
    names = selected(model, config.trained)
    runs = {}
    for name, objective in objectives.items():
        students = DenseStudents(model, (name,), names, place)
        runs[name] = Run(name, objective, config, students, place, parameter.dtype)
    results: dict[str, TrainResult | Exception] = {}
    while active := [run for name, run in runs.items() if name not in results]:
        loop.step(active)
        for run in active:
            if progress is not None:
                progress(run.name, run.step, config.steps)
            if run.done:
                results[run.name] = run.result("train")
    return {name: results[name] for name in objectives}


class _Loop:
    def __init__(self, base: FrozenBase) -> None:
        self.base = base

    def step(self, runs: list[Run]) -> None:
        conditions = {run.name: run.conditions for run in runs}
        batches = {run.name: run.draw() for run in runs}
        parts = {
            name: [rows for rows in (batch.retain, batch.forget) if rows is not None] for name, batch in batches.items()
        }
        targets = self.base.targets(parts, conditions)
        for run in runs:
            rows = parts[run.name]
            joined = concatenated([inputs_of(part, conditions[run.name]) for part in rows])
            predictions = run.students.predict({run.name: joined})[run.name].split([len(part.t) for part in rows])
            errors = [
                (prediction - target).square().mean()
                for prediction, target in zip(predictions, targets[run.name], strict=True)
            ]
            weights = (run.objective.retain_weight, run.objective.forget_weight)
            total = torch.stack([weight * error for weight, error in zip(weights, errors, strict=False)]).sum()
            retain, *forget = (error.item() for error in errors)
            run.add_losses(total.item(), retain, *(forget or [None]))
            total.backward()
            run.update()
