"""What a run would cost and how it would be executed: for --dry-run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from guda_fast.deltas import DeltaBank
from guda_fast.diffusion import Protocol
from guda_fast.estimators import Full
from guda_fast.forward import Choice, Engine
from guda_fast.prepare import Execution, Prepared, prepare


def print_cost(queries: Path, bank: DeltaBank, protocol: Protocol, how: Execution, **given: Any) -> None:
    """Check the inputs as a run would, measure a few forwards, and print forwards, FLOPs, memory, time and plan.

    given: ``conditions`` and ``latents``, as for attribute()
    """
    prepared = prepare(queries, bank, protocol, how, **given)
    engine, query_set = prepared.engine, prepared.queries
    models, rows = len(bank) + 1, len(query_set.x0) * protocol.draws
    forwards = Full().forwards(len(query_set.x0), len(bank), protocol)
    choice = engine.choose(models, rows)
    lines = {
        "queries": f"{len(query_set)} ({len(query_set.x0)} distinct)",
        "groups": str(len(bank)),
        "draws": f"{protocol.draws} ({len(protocol.timesteps)} timesteps x {protocol.samples} samples)",
        "forwards": f"{forwards:,} rows in batches of {engine.batches.size} on {engine.device}",
        "FLOPs": f"{engine.flop * forwards:.3g} ({engine.flop / 1e6:.3g} M a forward)",
        "deltas": f"{_mebibytes(sum(survey.bytes for survey in bank.survey().values()))} for all groups",
        "memory": _memory(engine, choice),
        "precision": _precision(prepared),
        "plan": f"{choice.plan}: {choice.reason}",
        "time": f"about {engine.seconds(choice, models, rows):.3g} s",
    }
    for name, value in lines.items():
        typer.echo(f"{name:<12} {value}")


def _memory(engine: Engine, choice: Choice) -> str:
    """Of the resident model with a copy of the base on the host, of a forward's activations, and of batched deltas."""
    tensors = [*engine.bank.model.parameters(), *engine.bank.model.buffers()]
    resident = sum(tensor.nbytes for tensor in tensors)
    base = sum(4 * tensor.numel() for tensor in tensors)
    text = f"{_mebibytes(resident)} the model, {_mebibytes(base)} the base on the host, "
    text += f"{_mebibytes(engine.batches.size * engine.activation_bytes_a_row)} activations"
    if choice.plan == "batched":
        text += f", {_mebibytes(engine.planner.batched().model.bytes)} the deltas of all groups"
    return text


def _precision(prepared: Prepared) -> str:
    worst = min(prepared.cosine, key=lambda group: prepared.cosine[group])
    text = f"{prepared.engine.precision.name}, which keeps a delta to a cosine of at least "
    text += f"{prepared.cosine[worst]:.4f} (group {worst})"
    return text if prepared.audit is None else f"{text}; {prepared.audit}"


def _mebibytes(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB"
