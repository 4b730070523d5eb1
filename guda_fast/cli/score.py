"""guda-fast score: attribute() from the command line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from guda_fast.cli.named import all_sources, in_full
from guda_fast.deltas.sources import Source
from guda_fast.results import RECORD, Attribution

_Queries = Annotated[Path, typer.Argument(help="A folder of images, read recursively.")]
_Base = Annotated[Path, typer.Option(help="The full-data model: a diffusers folder.")]
_Group = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=PATH of an unlearned model: a diffusers folder, a state dict, an adapter; once a group. After PATH "
        "may come ,format=partial ,weights=ema ,scale=-1 ,variant=fp16 as for guda_fast.Source."
    ),
]
_Groups = Annotated[
    Path | None, typer.Option(help="A folder with one unlearned model a sub-folder or weights file, named by it.")
]
_Pack = Annotated[Path | None, typer.Option(help="A delta pack with all groups, in place of --group and --groups.")]
_Conditions = Annotated[
    Path | None,
    typer.Option(help='JSON lines with "file_name" and "prompt" or "label" of each image, for a conditional model.'),
]
_Pipeline = Annotated[
    Path | None, typer.Option(help="A diffusers pipeline with the text encoder and the VAE; by default --base itself.")
]
_Scheduler = Annotated[Path | None, typer.Option(help="scheduler_config.json, if it is not beside the base.")]
_Out = Annotated[Path, typer.Option(help="Gets scores.parquet, scores.csv and run.json.")]


def score(
    context: typer.Context,
    queries: _Queries,
    base: _Base,
    group: _Group = None,
    groups: _Groups = None,
    pack: _Pack = None,
    conditions: _Conditions = None,
    pipeline: _Pipeline = None,
    scheduler: _Scheduler = None,
    out: _Out = Path("scores"),
    start: Annotated[int, typer.Option(help="First timestep.")] = 10,
    stop: Annotated[int | None, typer.Option(help="Timesteps stay below this.")] = None,
    stride: Annotated[int, typer.Option(help="Distance between timesteps.")] = 10,
    weighting: Annotated[str, typer.Option(help="elbo, elbo_fixed_large or simple.")] = "elbo",
    samples: Annotated[int, typer.Option(help="Noise samples a timestep.")] = 1,
    antithetic: Annotated[bool, typer.Option(help="Every second sample negates the one before.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 42,
    batch_size: Annotated[int | None, typer.Option(help="Rows a forward.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16, fp64, tf32 or fp16 (on CUDA), or auto.")] = "fp32",
    plan: Annotated[str, typer.Option(help="How forwards are executed: swap, batched, or auto.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compiled", help="Run the model through torch.compile.")] = False,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Go on where the precision gives other scores than fp32.")
    ] = False,
    top: Annotated[int, typer.Option(help="Groups to print a query.", min=1)] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and print the cost only.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a result that is in --out already.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True, callback=lambda context, value: _replay(context, value), help="A run.json to replay."
        ),
    ] = None,
) -> None:
    """Score images by how much their ELBO drops under each unlearned model."""
    from guda_fast import DeltaBank, Protocol, attribute
    from guda_fast.cli.conditioned import conditioned
    from guda_fast.prepare import Execution

    _check_out(out)
    if (out / RECORD).exists() and not (force or dry_run):
        raise FileExistsError(f"--out: {out} must not hold a result already, found {out / RECORD}; pass --force")
    bank = DeltaBank.load(base, _counterfactuals(group, groups, pack), scheduler=scheduler)
    if bank.scheduler is None:
        raise ValueError(f"--scheduler: must be given, found no scheduler_config.json in or beside {base}")
    protocol = Protocol.from_scheduler(
        bank.scheduler,
        start=start,
        stop=stop,
        stride=stride,
        weighting=weighting,
        samples=samples,
        antithetic=antithetic,
        seed=seed,
    )
    given = conditioned(queries, conditions, pipeline or base, device)
    how: Any = {field.name: context.params[field.name] for field in fields(Execution)}
    if dry_run:
        from guda_fast.cli.cost import print_cost

        print_cost(queries, bank, protocol, Execution(**how), **given)
        return
    begin = time.perf_counter()
    result = attribute(queries, bank, protocol, progress=True, **given, **how)
    for choice in result.provenance["choices"]:
        typer.echo(f"plan: {choice}")
    _write(result, out, {key: value for key, value in context.params.items() if key not in _NOT_REPLAYED})
    _print_top(result, min(top, len(bank.groups)))
    typer.echo(f"{len(result)} queries x {len(bank.groups)} groups in {time.perf_counter() - begin:.1f} s -> {out}")


_NOT_REPLAYED = ("out", "dry_run", "force", "config", "top")


def _check_out(out: Path) -> None:
    """Say before the work, and not after it, that the result cannot be written."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise NotADirectoryError(f"--out: must be a folder that can be written, found {existing}")


def _counterfactuals(group: list[str] | None, groups: Path | None, pack: Path | None) -> dict[str, Source] | Path:
    """The unlearned models by name, or the pack that has them all."""
    if pack is None:
        return all_sources(group, groups, "--group")
    if group or groups is not None:
        raise ValueError("--pack: must be the only one of --pack, --group and --groups, got another too")
    return pack


def _write(result: Attribution, out: Path, config: Mapping[str, Any]) -> None:
    plain = {key: _replayable(value) for key, value in config.items()}
    named = result.with_provenance(config=plain)
    named.to_parquet(out)
    named.to_csv(out / "scores.csv")


def _replayable(value: Any) -> Any:
    """Paths in full, so that the run can be replayed from another folder."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, list | tuple):
        return [in_full(entry) for entry in value]
    return value


def _print_top(result: Attribution, count: int, limit: int = 20) -> None:
    for name, ranked in list(zip(result.queries, result.top(count), strict=True))[:limit]:
        shown = "   ".join(f"{entry.group}  {entry.score:.4g} +- {entry.std_error:.2g}" for entry in ranked)
        typer.echo(f"{name}   {shown}")
    if len(result) > limit:
        typer.echo(f"... and {len(result) - limit} more")


def _replay(context: typer.Context, path: Path | None) -> Path | None:
    """Take the defaults of all other parameters from a run.json."""
    if path is None:
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
        context.default_map = {**dict(context.default_map or {}), **config}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"{path} must be the run.json of a score run, found {error!r}") from error
    return path
