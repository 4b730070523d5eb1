"""One training loop for everything: base models, LOGO retraining and every unlearning operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guda_fast._validate import check_int, describe
from guda_fast.counterfactuals.bound import RetainBound
from guda_fast.counterfactuals.checkpoint import model_digest
from guda_fast.counterfactuals.config import TrainConfig
from guda_fast.counterfactuals.loop import Loop
from guda_fast.counterfactuals.objective import Objective
from guda_fast.counterfactuals.result import TrainResult
from guda_fast.counterfactuals.run import FAILURES, Run
from guda_fast.counterfactuals.selection import selected
from guda_fast.counterfactuals.students import DenseStudents, Students

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

    On the CPU a run that was killed, at any moment, ends with the weights that it would have had, bit for bit.

    Returns the trained copy and its losses. Raises TypeError or ValueError naming the argument; FloatingPointError,
    naming the step, when the loss or the gradient is no longer finite, or the weights at the end are not (the last
    checkpoint is kept), or when all gradients overflowed float16; CheckpointError where the folder's checkpoint or log
    is damaged, or another run's.

    >>> result = train(unet, DenoisingObjective(data, schedule), TrainConfig(1000))  # doctest: +SKIP
    >>> result.save("runs/full")  # doctest: +SKIP
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

    objectives, work, identity: by the name of the run; see ``train``. progress: called after every step of every run.

    Each run has its own weights, optimiser, averages, random numbers, log and checkpoint. What they share is the
    forward of the frozen base, and for LoRA the forward of the students: there a run's company changes the rounding of
    its steps. On the CPU runs without LoRA share no forward, and are what they are alone bit for bit.

    Returns for each run what it gives, or what ended it while the others go on: FloatingPointError, CheckpointError,
    or what its own objective, bound, log or checkpoint raised. Raises TypeError or ValueError naming the argument.
    """
    _check(objectives, config, work, identity)
    check_int("train", "checkpoint_every", checkpoint_every, 1)
    parameter = _first_parameter(model)
    place = parameter.device if device is None else torch.device(device)
    loop = Loop(model, config, place)
    base = "" if work is None else model_digest(model)
    # Runs of one dataset have the same conditions, which are on the device once.
    conditions = {id(given): given for each in objectives.values() if (given := each.conditions) is not None}
    placed = {key: given.to(place, parameter.dtype) for key, given in conditions.items()}
    cohorts: list[list[Run]] = []
    for names, students in _students(model, tuple(objectives), config, place):
        cohorts.append([])
        for name in names:
            run = Run(name, objectives[name], config, students, placed.get(id(objectives[name].conditions)), place)
            if work is not None:
                run.kept_in(Path(work[name]), _settings(base, config, (identity or {}).get(name, "")))
            cohorts[-1].append(run)
    results: dict[str, TrainResult | Exception] = {}
    for run in (run for runs in cohorts for run in runs):
        try:
            _begin(run, loop)
        except FAILURES as error:
            results[run.name] = _named(run, error)
    _go(cohorts, loop, checkpoint_every, progress, results, parameter.device)
    return {name: results[name] for name in objectives}


def _check(
    objectives: Mapping[str, Objective],
    config: TrainConfig,
    work: Mapping[str, Path] | None,
    identity: Mapping[str, str] | None,
) -> None:
    if not isinstance(config, TrainConfig):
        raise TypeError(f"train: config must be a TrainConfig, got {describe(config)}")
    if work is not None and (len({Path(work[name]).resolve() for name in objectives if name in work})) < len(
        objectives
    ):
        raise ValueError(f"train: work must have a folder of its own for each run, got {describe(dict(work))}")
    if unknown := sorted(set(identity or ()) - set(objectives)):
        raise ValueError(f"train: identity must be of runs in objectives, got {describe(unknown)}")


def _begin(run: Run, loop: Loop) -> None:
    """Make a run ready for its first step, or for the one after its checkpoint."""
    if run.config.retain_bound is not None:
        run.bounded(RetainBound(run.objective, run.conditions, loop.base.model, run.config.seed))
    if not run.resume() and run.config.saliency is not None:
        run.masked(loop.saliency(run, run.config.saliency))


def _go(
    cohorts: Sequence[Sequence[Run]],
    loop: Loop,
    checkpoint_every: int,
    progress: TogetherCallback | None,
    results: dict[str, TrainResult | Exception],
    home: torch.device,
) -> None:
    """Take all runs to their ends, which are put into ``results``."""
    while True:
        for run in (run for runs in cohorts for run in runs if run.name not in results and run.done):
            results[run.name] = _result(run, home)
        going = [kept for runs in cohorts if (kept := [run for run in runs if run.name not in results])]
        if not going:
            return
        ended = loop.step(going)
        for run in (run for runs in going for run in runs):
            if run.name not in ended and (run.done or run.step % checkpoint_every == 0):
                try:
                    run.checkpoint()
                except FAILURES as error:
                    ended[run.name] = error
            if run.name in ended:
                results[run.name] = _named(run, ended[run.name])
                continue
            if progress is not None:
                progress(run.name, run.step, run.config.steps)


def _result(run: Run, device: torch.device) -> TrainResult | Exception:
    try:
        return run.result(device)
    except FloatingPointError as error:
        return _named(run, error)


def _named(run: Run, error: Exception) -> Exception:
    if not isinstance(error, FloatingPointError):
        return error
    return FloatingPointError(f"train: {'' if run.name == _ALONE else f'{run.name}: '}{error}")


def _students(
    model: nn.Module, names: tuple[str, ...], config: TrainConfig, device: torch.device
) -> list[tuple[tuple[str, ...], Students]]:
    """Who trains which runs: a copy of the model each, or LoRA factors of all on one."""
    if config.lora_rank is None:
        chosen = frozenset(selected(model, config.trained))
        return [((name,), DenseStudents(model, (name,), chosen, device)) for name in names]
    from guda_fast.counterfactuals.lora import LoraStudents

    alpha = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    return [
        (
            names,
            LoraStudents(
                model,
                names,
                rank=config.lora_rank,
                alpha=alpha,
                patterns=config.trained,
                seed=config.seed,
                device=device,
            ),
        )
    ]


def _settings(base: str, config: TrainConfig, identity: str) -> dict[str, Any]:
    """What a checkpoint must have been made with."""
    return {"format": 2, "base": base, "identity": identity, **config.settings()}


def _first_parameter(model: nn.Module) -> nn.Parameter:
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.dtype not in (torch.float32, torch.float64):
        found = "none" if parameter is None else str(parameter.dtype).removeprefix("torch.")
        raise TypeError(f"train: model must have float32 or float64 parameters, got {found}")
    return parameter
