"""guda-fast logo: models retrained without a group, the oracle of GUDA's scores."""

from __future__ import annotations

from typing import Annotated

import typer

from guda_fast.cli.runs import Base, Checkpoints, Data, Devices, DryRun, Groups, Out, Together, make, split_groups


def logo(
    base: Base,
    data: Data,
    out: Out,
    groups: Groups = "all",
    seed: Annotated[
        int | None, typer.Option(help="Of first weights, batches and noise. [the base's]", min=0, max=2**62)
    ] = None,
    together: Together = 1,
    checkpoint_every: Checkpoints = 100,
    device: Devices = None,
    dry_run: DryRun = False,
) -> None:
    """Repeat the training of a base once for each group, without the group's images."""
    from guda_fast.counterfactuals.orders import LogoOrder

    make(
        LogoOrder(base, data, split_groups(groups), seed),
        out,
        devices=device,
        together=together,
        checkpoint_every=checkpoint_every,
        dry_run=dry_run,
    )
