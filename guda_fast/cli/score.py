"""guda-fast score: attribute() from the command line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from guda_fast._validate import check_choice
from guda_fast.cli.controls import CONTROL_NAMES, control_names
from guda_fast.cli.draws import SEED, START, STRIDE
from guda_fast.cli.estimating import (
    CandidatesOption,
    CandidatesTopOption,
    ConfidenceOption,
    Estimating,
    EstimatorOption,
    FinalistsOption,
    ForwardsOption,
    MaxDrawsOption,
    PilotOption,
    PilotQueriesOption,
    TopOption,
    TreeOption,
    summary,
)
from guda_fast.cli.named import all_sources, in_full, sources_in
from guda_fast.cli.storing import (
    ActorGpusOption,
    ActorsOption,
    AddressOption,
    DevicesOption,
    EngineOption,
    LeaseOption,
    LogOption,
    MetricsOption,
    ShardGroupsOption,
    ShardQueriesOption,
    StoreOption,
    check_absent,
    score_into_store,
)
from guda_fast.datasets.decoding import ON_ERROR
from guda_fast.datasets.inputs import LABEL, PROMPT
from guda_fast.deltas.sources import Source
from guda_fast.results import CONTROLS, RECORD, WIDE, Attribution, RankedGroup

_Queries = Annotated[
    Path,
    typer.Argument(
        help="A folder of images, read recursively; or a Parquet, WebDataset or safetensors file, or a folder of them."
    ),
]
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
_Controls = Annotated[
    str | None,
    typer.Option(
        help="Control groups, whose scores give the others their p-values: a folder with one model each, as for "
        f"--groups, or a pattern of names among the groups. Groups called {CONTROL_NAMES} "
        "are controls by default, and beside a folder too."
    ),
]
_Conditions = Annotated[
    str | None,
    typer.Option(
        help='For a conditional model: JSON lines with "file_name" and "prompt" or "label" of each image; or the word '
        "prompt or label, for what Parquet, tar or safetensors files have of their own."
    ),
]
_OnError = Annotated[
    str, typer.Option(help="What an image that cannot be read does: stop with its name, or skip, which prints it.")
]
_Column = Annotated[
    str | None, typer.Option(help='Of the images in Parquet, "image" by default, or the tensor in safetensors.')
]
_Pipeline = Annotated[
    Path | None, typer.Option(help="A diffusers pipeline with the text encoder and the VAE; by default --base itself.")
]
_Scheduler = Annotated[Path | None, typer.Option(help="scheduler_config.json, if it is not beside the base.")]
_Out = Annotated[
    Path, typer.Option(help="Gets scores.parquet, scores.csv and run.json; controls.parquet where there are controls.")
]


def score(
    context: typer.Context,
    queries: _Queries,
    base: _Base,
    group: _Group = None,
    groups: _Groups = None,
    pack: _Pack = None,
    controls: _Controls = None,
    conditions: _Conditions = None,
    on_error: _OnError = "stop",
    column: _Column = None,
    pipeline: _Pipeline = None,
    scheduler: _Scheduler = None,
    out: _Out = Path("scores"),
    start: Annotated[int, typer.Option(help="First timestep.")] = START,
    stop: Annotated[int | None, typer.Option(help="Timesteps stay below this.")] = None,
    stride: Annotated[int, typer.Option(help="Distance between timesteps.")] = STRIDE,
    weighting: Annotated[str, typer.Option(help="elbo, elbo_fixed_large or simple.")] = "elbo",
    samples: Annotated[int, typer.Option(help="Noise samples a timestep.")] = 1,
    antithetic: Annotated[bool, typer.Option(help="Every second sample negates the one before.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = SEED,
    batch_size: Annotated[int | None, typer.Option(help="Rows a forward.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16, fp64, tf32 or fp16 (on CUDA), or auto.")] = "fp32",
    plan: Annotated[str, typer.Option(help="How forwards are executed: swap, batched, or auto.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compiled", help="Run the model through torch.compile.")] = False,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Go on where the precision gives other scores than fp32.")
    ] = False,
    top: TopOption = None,
    estimator: EstimatorOption = "full",
    confidence: ConfidenceOption = None,
    max_draws: MaxDrawsOption = None,
    finalists: FinalistsOption = None,
    pilot: PilotOption = None,
    pilot_queries: PilotQueriesOption = None,
    forwards: ForwardsOption = None,
    tree: TreeOption = None,
    candidates: CandidatesOption = None,
    candidates_top: CandidatesTopOption = None,
    store: StoreOption = None,
    engine: EngineOption = None,
    devices: DevicesOption = None,
    actors: ActorsOption = None,
    actor_gpus: ActorGpusOption = None,
    address: AddressOption = None,
    shard_queries: ShardQueriesOption = None,
    shard_groups: ShardGroupsOption = None,
    lease: LeaseOption = None,
    metrics: MetricsOption = None,
    log: LogOption = None,
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

    check_choice("score", "--on-error", on_error, ON_ERROR)
    if store is not None:
        how_scored = Estimating.of(context.params)
        models, _ = _counterfactuals(group, groups, pack, controls)
        score_into_store(context.params, models, how_scored, _config(context.params))
        return
    check_absent(context.params)
    check_out(out)
    if (out / RECORD).exists() and not (force or dry_run):
        raise FileExistsError(f"--out: {out} must not hold a result already, found {out / RECORD}; pass --force")
    how_scored = Estimating.of(context.params)
    counterfactuals, named = _counterfactuals(group, groups, pack, controls)
    bank = DeltaBank.load(base, counterfactuals, scheduler=scheduler)
    others = [name for name in bank.groups if name not in named]
    null = [*named, *control_names(others, None if named else controls)]
    how_scored.check_controls(null)
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
    given = conditioned(queries, conditions, pipeline or base, device, column)
    given |= {"on_error": on_error, "column": column}
    how: Any = {field.name: context.params[field.name] for field in fields(Execution)}
    if dry_run:
        from guda_fast.cli.cost import print_cost

        print_cost(queries, bank, protocol, Execution(**how), how_scored, **given)
        return
    begin = time.perf_counter()
    scored: Any = {"estimator": how_scored.estimator, "candidates": how_scored.candidates}
    result = attribute(queries, bank, protocol, progress=True, **scored, **given, **how)
    for name, reason in result.provenance["skipped"].items():
        typer.echo(f"skipped {name}: {reason}")
    for choice in result.provenance["choices"]:
        typer.echo(f"plan: {choice}")
    ranked = result.with_p_values(null) if null else result
    ranked = ranked.with_provenance(config=_config(context.params))
    _write(ranked, result.select(null) if null else None, out)
    _print_top(ranked, min(how_scored.top, len(ranked.groups)))
    for line in summary(result):
        typer.echo(line)
    counted = f"{len(ranked.groups)} groups" + (f" and {len(null)} controls" if null else "")
    typer.echo(f"{len(result)} queries x {counted} in {time.perf_counter() - begin:.1f} s -> {out}")


_NOT_REPLAYED = ("out", "store", "log", "metrics", "dry_run", "force", "config")


def check_out(out: Path) -> None:
    """Say before the work, and not after it, that the result cannot be written."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise NotADirectoryError(f"--out: must be a folder that can be written, found {existing}")


def _counterfactuals(
    group: list[str] | None, groups: Path | None, pack: Path | None, controls: str | None
) -> tuple[dict[str, Source] | Path, list[str]]:
    """The unlearned models by name, or the pack that has them all; and the controls that come from their own folder."""
    folder = Path(controls) if controls is not None and Path(controls).is_dir() else None
    if pack is None:
        found = all_sources(group, groups, "--group")
        null = {} if folder is None else sources_in(folder, found, "--group and --groups", "--controls")
        if folder is not None and not null:
            raise ValueError(f"--controls: must hold at least one model, found none in {folder}")
        return found | null, list(null)
    if group or groups is not None:
        raise ValueError("--pack: must be the only one of --pack, --group and --groups, got another too")
    if folder is not None:
        raise ValueError(f"--controls: must be a pattern of names in the pack, got the folder {folder}")
    return pack, []


def _config(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The options that replay the run, from any folder."""
    plain = {key: _replayable(value) for key, value in parameters.items() if key not in _NOT_REPLAYED}
    if plain["conditions"] not in (None, PROMPT, LABEL):
        plain["conditions"] = str(Path(plain["conditions"]).absolute())
    if plain["controls"] is not None and Path(plain["controls"]).is_dir():
        plain["controls"] = str(Path(plain["controls"]).absolute())
    return plain


def _write(result: Attribution, controls: Attribution | None, out: Path) -> None:
    (out / RECORD).unlink(missing_ok=True)  # comes last again: what lacks it is not whole
    if controls is None:
        (out / CONTROLS).unlink(missing_ok=True)  # of a result that this one replaces
    else:
        controls.to_parquet(out / CONTROLS)
    result.to_csv(out / WIDE)
    result.to_parquet(out)


def _replayable(value: Any) -> Any:
    """Paths in full."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, list | tuple):
        return [in_full(entry) for entry in value]
    return value


def _print_top(result: Attribution, count: int, limit: int = 20) -> None:
    sure = [""] * len(result)
    if result.race_confidence is not None:
        sure = [f"   (confidence {value:.4g})" for value in result.race_confidence]
    for name, ranked, suffix in list(zip(result.queries, result.top(count), sure, strict=True))[:limit]:
        typer.echo(f"{name}   {'   '.join(map(_shown, ranked))}{suffix}")
    if len(result) > limit:
        typer.echo(f"... and {len(result) - limit} more")
    estimates = ", of ~ by the draws that are missing" if result.estimated.any() else ""
    typer.echo(f"+-: half of the 95 % interval, by the noise of the protocol{estimates}")


def _shown(entry: RankedGroup) -> str:
    half = (entry.high - entry.low) / 2
    text = f"{entry.group}  {'' if entry.exact else '~'}{entry.score:.4g} +- {half:.2g}"
    return text if math.isnan(entry.p_value) else f"{text} (p {entry.p_value:.2g})"


def _replay(context: typer.Context, path: Path | None) -> Path | None:
    """Take the defaults of all other parameters from a run.json."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        config = found.get("record", found)["config"]  # of a store, or of a result
        context.default_map = {**dict(context.default_map or {}), **config}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"{path} must be the run.json of a score run, found {error!r}") from error
    return path
