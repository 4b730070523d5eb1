"""guda-fast train: a base, from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guda_fast.cli.runs import BatchSize, Checkpoints, Data, Devices, DryRun, Settings, make, parsed_settings


def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Gets the model: a diffusers pipeline folder.")],
    network: Annotated[
        str, typer.Option(help="digits, small, ddpm-cifar10, or a .json file of a diffusers configuration.")
    ] = "digits",
    steps: Annotated[int | None, typer.Option(help="Optimiser steps. [the network's]", min=1)] = None,
    batch_size: BatchSize = None,
    label_dropout: Annotated[
        float, typer.Option(help="Share of images shown with the null label, for data that have one.", min=0, max=1)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of first weights, batches and noise.", min=0, max=2**62)] = 0,
    settings: Settings = None,
    checkpoint_every: Checkpoints = 100,
    device: Devices = None,
    dry_run: DryRun = False,
) -> None:
    """Train a base on all groups; class-conditional where the data have labels."""
    from guda_fast.counterfactuals.orders import BaseOrder

    if device is not None and len(device) > 1:
        raise ValueError(f"--device: must be given once for one model, got {', '.join(device)}")
    given = {
        **parsed_settings(settings, ("network", "steps", "batch_size", "label_dropout", "seed")),
        "seed": seed,
        **({} if steps is None else {"steps": steps}),
    }
    target = out.resolve()  # its name is that of the run, which "." and ".." are not
    order = BaseOrder(data, target.name, network, given, batch_size, label_dropout)
    make(order, target.parent, devices=device, checkpoint_every=checkpoint_every, dry_run=dry_run, beside=False)
