"""guda-fast unlearn: models that have forgotten a group, at a small part of what retraining costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guda_fast.cli.runs import (
    Base,
    BatchSize,
    Checkpoints,
    Data,
    Devices,
    DryRun,
    Groups,
    Out,
    Settings,
    Together,
    make,
    parsed_settings,
    split_groups,
    typed_values,
)


def unlearn(
    operator: Annotated[str, typer.Argument(help="retrack, esd, siss, erasediff or redirect.")],
    base: Base,
    data: Data,
    out: Out,
    groups: Groups = "all",
    controls: Annotated[int, typer.Option(help="Control groups beside them: random subsets, for p-values.", min=0)] = 0,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps. [the preset's, or 300]", min=1)] = None,
    batch_size: BatchSize = None,
    preset: Annotated[str, typer.Option(help="default; for retrack also official.")] = "default",
    seed: Annotated[int, typer.Option(help="Of batches and noise.", min=0, max=2**62)] = 0,
    settings: Settings = None,
    pack: Annotated[Path | None, typer.Option(help="A delta pack that gets each model when it is finished.")] = None,
    together: Together = 1,
    checkpoint_every: Checkpoints = 100,
    device: Devices = None,
    dry_run: DryRun = False,
) -> None:
    """Unlearn each group from a base by an operator."""
    from guda_fast.counterfactuals.orders import UnlearnOrder
    from guda_fast.counterfactuals.recipes import UnlearningRecipe

    given = parsed_settings(settings, ("steps", "batch_size", "preset", "seed"))
    with typed_values():
        recipe = UnlearningRecipe(operator, preset, steps, batch_size, {"seed": seed, **given})
    order = UnlearnOrder(base, data, recipe, split_groups(groups), controls)
    packing = None if pack is None else (pack, base)
    make(
        order, out, devices=device, together=together, checkpoint_every=checkpoint_every, dry_run=dry_run, pack=packing
    )
