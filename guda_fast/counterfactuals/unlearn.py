"""gf.unlearn: one counterfactual, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guda_fast.counterfactuals.recipes import Unlearning, UnlearningRecipe
from guda_fast.counterfactuals.trainer import TrainResult, train
from guda_fast.datasets.grouped import GroupedImages


def unlearn(
    operator: str,
    base: str | Path | nn.Module,
    data: GroupedImages,
    *,
    group: str,
    steps: int | None = None,
    batch_size: int | None = None,
    preset: str = "default",
    scheduler: object = None,
    device: torch.device | str | None = None,
    work: Path | None = None,
    progress: Callable[[int, int], object] | None = None,
    **options: Any,
) -> TrainResult:
    """A copy of a base that has unlearned a group: theta_k from theta_0 by an operator's loss, and no retraining.

    operator: a key of ``OPERATORS``, such as "retrack". base: a diffusers folder, or a model, which stays as it is.
    data: what the base was trained on, in groups. group: the one to forget.
    steps: optimiser steps [>= 1; None for the preset's, or 300]. batch_size: forget images, and again retain images,
        a step [>= 1; None for the preset's]. preset: one of the operator's.
    scheduler: of a base that has none beside it: a configuration, a diffusers scheduler or a path.
    device: of the training [that of the base]. work: a folder from which the same call goes on after it was killed.
    progress: called after every step with (steps done, steps in all).
    options: of the operator, and fields of ``TrainConfig``, in place of the preset's.

    Returns the model, its losses and seconds; ``save(folder)`` writes what ``DeltaBank.load`` reads.
    Raises TypeError or ValueError naming the argument, the group or the option, with the choices; CheckpointError
    where the base does not fit the data; FloatingPointError where the loss diverges.
    Source: GUDA (arXiv 2601.22651); of each operator, see its objective.

    >>> result = unlearn("retrack", "runs/full", load_digits(), group="3", steps=80)  # doctest: +SKIP
    >>> result.save("runs/unlearned/3")  # doctest: +SKIP
    """
    recipe = UnlearningRecipe(operator, preset, steps, batch_size, options)
    series = Unlearning(data, base, recipe, (group,), scheduler=scheduler)
    return train(
        series.start,
        series.objective(group),
        series.config(group),
        device=device,
        work=work,
        # Group, operator and data are in no TrainConfig: without them a folder would give another run's weights.
        identity=json.dumps(series.settings(group), sort_keys=True),
        progress=progress,
    )
