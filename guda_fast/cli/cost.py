"""What a run would cost, measured on one batch: for --dry-run."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from guda_fast.attribution import prepare
from guda_fast.deltas import DeltaBank
from guda_fast.diffusion import Protocol
from guda_fast.estimators import Full

_WARM_UP, _TIMED = 2, 5


def print_cost(
    queries: Path,
    bank: DeltaBank,
    protocol: Protocol,
    *,
    batch_size: int | None,
    device: str | None,
    precision: str,
) -> None:
    """Check the inputs as a run would, time a few batches, and print forwards, FLOPs, the deltas' memory and time."""
    plan, query_set = prepare(queries, bank, protocol, batch_size=batch_size, device=device, precision=precision)
    forwards = Full().forwards(len(query_set.x0), len(bank.groups), protocol)
    # The last batch of each model is padded.
    batches = (len(bank.groups) + 1) * math.ceil(len(query_set.x0) * protocol.draws / plan.batch_size)
    x0 = query_set.x0[:1].to(plan.device, plan.dtype)
    ids = torch.zeros(1, dtype=torch.int64, device=plan.device)
    rows = torch.zeros(plan.batch_size, dtype=torch.int64)
    with FlopCounterMode(display=False) as flops:
        plan.errors(bank.model, x0, ids, rows, rows)
    times = []
    for _ in range(_WARM_UP + _TIMED):
        begin = time.perf_counter()
        plan.errors(bank.model, x0, ids, rows, rows)
        times.append(time.perf_counter() - begin)
    seconds = sorted(times[_WARM_UP:])[_TIMED // 2] * batches
    a_forward = flops.get_total_flops() / plan.batch_size
    typer.echo(f"queries      {len(query_set)} ({len(query_set.x0)} distinct)")
    typer.echo(f"groups       {len(bank.groups)}")
    typer.echo(f"draws        {protocol.draws} ({len(protocol.timesteps)} timesteps x {protocol.samples} samples)")
    typer.echo(f"forwards     {forwards:,} rows in batches of {plan.batch_size} on {plan.device}")
    typer.echo(f"FLOPs        {a_forward * batches * plan.batch_size:.3g} ({a_forward / 1e6:.3g} M a forward)")
    typer.echo(f"deltas       {sum(delta.bytes for delta in bank.deltas) / 2**20:.1f} MiB in memory")
    typer.echo(f"time         about {seconds:.0f} s, from {_TIMED} timed batches")
