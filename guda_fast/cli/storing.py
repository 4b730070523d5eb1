"""guda-fast score into a store: its options, and a run by one of the engines."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guda_fast.cli.estimating import Estimating
from guda_fast.errors import CancelledError

if TYPE_CHECKING:
    from guda_fast.deltas.sources import Source
    from guda_fast.engines import Engine, Job, Place, Rank, Worker
    from guda_fast.engines.ray_actors import RayActors
    from guda_fast.store import Store

ENGINES = ("local", "torchrun", "slurm", "ray")
_DRAWS = ("start", "stop", "stride", "weighting", "samples", "antithetic", "seed")
_SHOWN = 20
_OF_RAY = ("actors", "actor_gpus", "address")
_NEEDED = ("engine", "devices", *_OF_RAY, "shard_queries", "shard_groups", "lease", "metrics", "log")

StoreOption = Annotated[
    Path | None,
    typer.Option(
        help="A folder that keeps scores in parts, in place of --out: the same command goes on where it stopped, with "
        "more images or groups it computes what is new, and any number of processes may run it at once."
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        help="Of --store: local, the devices of this machine; torchrun or slurm, as one of the processes that it "
        "starts; ray, a Ray cluster. [local]"
    ),
]
DevicesOption = Annotated[
    str | None,
    typer.Option(help="Of --engine local: cpu,cpu or cuda:0,cuda:1 ..., a process for each; or all. [--device]"),
]
ActorsOption = Annotated[
    int | None,
    typer.Option(help="Of --engine ray: how many work. [one a GPU, or a CPU where there is none]", min=1),
]
ActorGpusOption = Annotated[
    float | None,
    typer.Option(help="Of --engine ray: GPUs of an actor, as 0.5 for two on one. [1, or 0 where there is none]", min=0),
]
AddressOption = Annotated[
    str | None,
    typer.Option(help="Of --engine ray: of a cluster. [$RAY_ADDRESS, or a cluster of this machine, made for the run]"),
]
ShardQueriesOption = Annotated[
    int | None, typer.Option(help="Of a new --store: images of a part at most. [1024]", min=1)
]
ShardGroupsOption = Annotated[int | None, typer.Option(help="Of a new --store: groups of a part at most. [all]", min=1)]
LeaseOption = Annotated[
    float | None,
    typer.Option(help="Of --store: seconds without a forward after which others take a process's part. [300]", min=0.1),
]
MetricsOption = Annotated[Path | None, typer.Option(help="Of --store: a Prometheus text file, kept up to date.")]
LogOption = Annotated[Path | None, typer.Option(help="Of --store: JSON lines are appended to it, one an event.")]


def check_absent(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that says nothing without --store."""
    for name in _NEEDED:
        if options[name] is not None:
            raise ValueError(f"--{name.replace('_', '-')}: must come with --store, got it alone")


def score_into_store(
    options: Mapping[str, Any], counterfactuals: Mapping[str, Source] | Path, how: Estimating, config: Mapping[str, Any]
) -> None:
    """Score what is not in the store yet; or, for a dry run, print what there is to do and what it costs.

    options: of ``score``, by name. config: replays the run.
    """
    from guda_fast.engines import LEASE, Place

    _check_options(options)
    rank, devices = _placed(options)
    job = _job(options, counterfactuals, how)
    with _stoppable() as stopped:
        place = Place(lambda: bool(stopped), options["lease"] or LEASE)
        if options["dry_run"]:
            from guda_fast.cli.store_cost import print_store_cost

            print_store_cost(
                options["store"], job, devices, options["shard_queries"] or _QUERIES, options["shard_groups"]
            )
            return
        run = _Run(options, job, rank, devices, place, config, _ray(options, place))
        run.go(how.top)


_QUERIES = 1024


@dataclass
class _Run:
    """A run that is not dry, by its options.

    rank: which process this is of many. devices: that it works on. ray: what does the work in its place.
    """

    options: Mapping[str, Any]
    job: Job
    rank: Rank | None
    devices: list[str]
    place: Place
    config: Mapping[str, Any]
    ray: RayActors | None

    def go(self, top: int) -> None:
        from guda_fast.engines import Log, Monitor, add_queries, open_run

        store, worker = open_run(
            self.options["store"],
            self.job,
            self.devices[0],
            shard_queries=self.options["shard_queries"] or _QUERIES,
            shard_groups=self.options["shard_groups"],
            config=self.config,
        )
        many = self.rank is not None and self.rank.count > 1
        wait = self.place.lease if self.rank is not None and self.rank.number > 0 else 0.0
        with Log(self.options["log"]) as log:
            try:
                new = add_queries(store, worker.inputs, trusted=many, patience=wait, stop=self.place.stop)
                shards = [shard for shard in store.shards() if worker.can_score(store, shard)]
                missing = set(store.missing())
                left = [shard for shard in shards if shard in missing]
                log.write("start", store=str(store.path), queries=store.queries, new=new, shards=len(left))
                engine = self._engine(worker)
                job = worker.job
                del worker  # several processes need its memory
                shown = self.rank is None or self.rank.number == 0
                with Monitor(store, shards, log, metrics=self.options["metrics"], shown=shown) as monitor:
                    engine.run(store, job, left, monitor)
            except CancelledError:
                log.write("stop", left=len(store.missing()))
            except BaseException as error:
                log.write("error", text=f"{type(error).__name__}: {error}")
                raise
            else:
                log.write("end", left=len(store.missing()))
        _say(store, top)

    def _engine(self, worker: Worker) -> Engine:
        from guda_fast.engines import Local, Ranks

        if self.ray is not None:
            return self.ray
        if self.rank is not None:
            return Ranks(self.rank, self.place, worker)
        return Local(self.devices, self.place, worker if len(self.devices) == 1 else None)


def _check_options(options: Mapping[str, Any]) -> None:
    if options["candidates"] is not None:
        raise ValueError("--candidates: must come without --store, whose parts have every group, got both")
    if options["controls"] is not None:
        raise ValueError(
            "--controls: must come without --store, got both; give controls as groups, and take p-values from the "
            "result: Store.open(folder).result().with_p_values(controls)"
        )
    if options["force"]:
        raise ValueError("--force: must come without --store, which is never replaced, got both")
    folder = options["store"].absolute()
    if not folder.parent.is_dir() or not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        raise NotADirectoryError(f"--store: must be a folder that can be written, found {folder}")


def _placed(options: Mapping[str, Any]) -> tuple[Rank | None, list[str]]:
    """Which process this is of many, if any, and the devices that it works on."""
    import torch

    from guda_fast.cli.runs import checked_devices
    from guda_fast.engines import Rank

    name, given, device = options["engine"] or "local", options["devices"], options["device"]
    if name not in ENGINES:
        raise ValueError(f"--engine: must be one of {', '.join(ENGINES)}, got {name!r}")
    if given is not None and (device is not None or name != "local"):
        raise ValueError("--devices: must come with --engine local and without --device, got another")
    for option in _OF_RAY:
        if name != "ray" and options[option] is not None:
            raise ValueError(f"--{option.replace('_', '-')}: must come with --engine ray, got --engine {name}")
    if name in ("torchrun", "slurm"):
        rank = Rank.of_torchrun(os.environ) if name == "torchrun" else Rank.of_slurm(os.environ)
        return rank, [device or rank.device]
    if given == "all":
        count = torch.cuda.device_count()
        return None, [f"cuda:{number}" for number in range(count)] or ["cpu"]
    return None, checked_devices(given.split(",") if given else [device] if device else None)


def _ray(options: Mapping[str, Any], place: Place) -> RayActors | None:
    if options["engine"] != "ray":
        return None
    from guda_fast.engines.ray_actors import RayActors

    return RayActors(place, *(options[name] for name in _OF_RAY))


def _job(options: Mapping[str, Any], counterfactuals: Mapping[str, Source] | Path, how: Estimating) -> Job:
    from guda_fast.engines import Job
    from guda_fast.prepare import Execution

    return Job(
        queries=options["queries"],
        base=options["base"],
        counterfactuals=counterfactuals,
        draws={name: options[name] for name in _DRAWS},
        execution=Execution(**{field.name: options[field.name] for field in fields(Execution)}),
        estimator=how.estimator,
        scheduler=options["scheduler"],
        conditions=options["conditions"],
        pipeline=options["pipeline"],
        on_error=options["on_error"],
        column=options["column"],
    )


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """A list that has something in it when SIGTERM or Ctrl-C came; the second time they do what they did before."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, stop)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(store: Store, top: int) -> None:
    """The top groups of some queries, or what remains."""
    missing = store.missing()
    failures = store.failures()
    for failure in failures[:_SHOWN]:
        typer.echo(f"skipped {failure.query}: {failure.reason}")
    if len(failures) > _SHOWN:
        typer.echo(f"... and {len(failures) - _SHOWN} more")
    every = store.queries * len(store.groups)
    cells = sum(shard.cells for shard in missing)
    if not missing:
        for name, ranked in islice(store.top(min(top, len(store.groups))), _SHOWN):
            typer.echo(f"{name}   {'   '.join(f'{entry.group}  {entry.score:.4g}' for entry in ranked)}")
    typer.echo(f"{every - cells:,} of {every:,} cells -> {store.path}")
    if missing:
        typer.echo(f"{cells:,} cells in {len(missing):,} shards remain; the same command goes on from them")
