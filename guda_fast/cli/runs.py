"""What train, logo and unlearn have in common: devices, progress, cost, and what is said at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from tqdm import tqdm

from guda_fast.errors import MENDABLE

if TYPE_CHECKING:
    from guda_fast.counterfactuals.packing import Packer
    from guda_fast.counterfactuals.processes import Order
    from guda_fast.counterfactuals.queue import Event
    from guda_fast.counterfactuals.recipes import Series

_MAX_SHOWN = 10

Data = Annotated[str, typer.Option(help="What to train on: a name or a folder, then ,KEY=VALUE choices.")]
Base = Annotated[Path, typer.Option(help="The full-data model: a diffusers folder, such as train makes.")]
Groups = Annotated[str, typer.Option(help="all, or names with commas between them.")]
Out = Annotated[Path, typer.Option(help="Gets a folder a group; finished ones in it are reused.")]
Devices = Annotated[
    list[str] | None,
    typer.Option("--device", help="cpu, cuda, cuda:1 ...; once a process. [cuda where there is one, or cpu]"),
]
Together = Annotated[int, typer.Option(help="Groups that a process makes in one loop.", min=1)]
Settings = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of another setting; once a setting.")]
Checkpoints = Annotated[
    int, typer.Option("--checkpoint-every", help="Steps after which a run can go on when it is killed.", min=1)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the cost only.")]
BatchSize = Annotated[int | None, typer.Option(help="Images a step.", min=1)]


class Progress:
    """Bars over groups, and over the steps of those that are being made.

    names: of all runs. done: how many are finished already. then: called with the name of a finished run.
    """

    def __init__(self, names: Sequence[str], done: int, then: Callable[[str], object] | None = None) -> None:
        self._then = then
        self._bars: dict[str, tqdm[Any]] = {}
        hidden = len(names) == 1 or done == len(names)
        self._all = tqdm(
            total=len(names), initial=done, desc="groups", unit="group", dynamic_ncols=True, disable=hidden
        )

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if event.kind == "step":
            if event.name not in self._bars:
                self._bars[event.name] = tqdm(
                    total=event.steps, desc=event.name, unit="step", leave=False, dynamic_ncols=True
                )
            bar = self._bars[event.name]
            bar.update(event.done - bar.n)
        elif event.kind == "waiting":
            self._all.set_postfix_str("waiting for other processes")
        else:
            if event.name in self._bars:
                self._bars.pop(event.name).close()
            if event.text:
                self._all.write(f"{event.name}: {event.text}")
            if event.kind == "finished":
                self._all.update()
                if self._then is not None:
                    self._then(event.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for bar in (*self._bars.values(), self._all):
            bar.close()


def make(
    order: Order,
    out: Path,
    *,
    devices: Sequence[str] | None,
    together: int = 1,
    checkpoint_every: int = 100,
    dry_run: bool = False,
    pack: tuple[Path, Path] | None = None,
    beside: bool = True,
) -> None:
    """Make all runs of an order below ``out``, or print their cost; exit status 1 where one is not there in the end.

    pack: of the finished models, and their base. beside: write the data's manifest beside the models
    """
    from guda_fast.counterfactuals.processes import work_through
    from guda_fast.counterfactuals.runs import check_alike, finished, write_manifest

    places = checked_devices(devices)
    series = order.open()
    _say_overlaps(series)
    left = [name for name in series.names if not finished(out / name, series.settings(name))]
    if beside:
        check_alike(out, series.settings(series.names[0]))
    packer = _packer(pack, out, series.names)
    _check_first(series, left)
    if dry_run:
        print_cost(series, left, places, together)
        return
    if beside:
        write_manifest(out, series.record)
    packing = None if packer is None else _Packing(packer)
    if packing is not None:
        packing.add([name for name in series.names if name not in left])
    done = len(series.names) - len(left)
    with Progress(series.names, done, None if packing is None else lambda name: packing.add([name])) as progress:
        found = work_through(
            order, series, out, progress, devices=places, together=together, checkpoint_every=checkpoint_every
        )
    failures = dict(found)
    where = out if beside else out / series.names[0]
    typer.echo(f"{len(series.names) - len(failures)} of {len(series.names)} finished ({done} before) -> {where}")
    if packing is not None:
        packing.add([name for name in series.names if name not in failures])  # also what other commands have made
        failures |= packing.failures
    _say(failures)


def _say_overlaps(series: Series) -> None:
    """Groups that share images: what is unlearned in one stays in the other."""
    overlaps = series.record["overlaps"]
    for overlap in overlaps[:_MAX_SHOWN]:
        first, second = overlap["groups"]
        typer.echo(f"groups {first} and {second} share {overlap['equal']} images", err=True)
    if len(overlaps) > _MAX_SHOWN:
        typer.echo(f"... and {len(overlaps) - _MAX_SHOWN} more pairs of groups", err=True)


def _packer(pack: tuple[Path, Path] | None, models: Path, names: Sequence[str]) -> Packer | None:
    from guda_fast.counterfactuals.packing import Packer

    return None if pack is None else Packer(*pack, models, names)


class _Packing:
    """Finished models go to a pack; where that fails, making goes on, and it is said at the end."""

    def __init__(self, packer: Packer) -> None:
        self.failures: dict[str, str] = {}
        self._packer = packer

    def add(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                self._packer.add([name])
            except MENDABLE as error:
                self.failures[f"{name} in the pack"] = str(error)
            else:
                self.failures.pop(f"{name} in the pack", None)


def _say(failures: Mapping[str, str]) -> None:
    """Each reason once, with the groups that it stopped."""
    reasons: dict[str, list[str]] = {}
    for name, reason in failures.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        typer.echo(f"guda-fast: error: {', '.join(names)}: {reason}", err=True)
    if reasons:
        raise typer.Exit(1)


def checked_devices(devices: Sequence[str] | None) -> list[str]:
    """Those given, or CUDA where there is one; ValueError for one that is not there."""
    import torch

    count = torch.cuda.device_count()
    for name in devices or ():
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"--device: must be cpu, cuda, cuda:1 ..., got {name!r}") from error
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
            raise ValueError(f"--device: must be cpu or one of {count} CUDA devices, got {name!r}")
    return list(devices or ["cuda" if count else "cpu"])


def parsed_settings(entries: Sequence[str] | None, own: Sequence[str] = ()) -> dict[str, Any]:
    """KEY=VALUE entries; a value is JSON, or else a text.

    own: keys that the command has options of their own for, which are refused: one of two values would be lost

    >>> parsed_settings(["lr=1e-4", "retain=distill", "ema_decay=null"])
    {'lr': 0.0001, 'retain': 'distill', 'ema_decay': None}
    """
    found: dict[str, Any] = {}
    for entry in entries or ():
        key, sign, text = entry.partition("=")
        if not (key and sign):
            raise ValueError(f"--set: must be KEY=VALUE, got {entry!r}")
        if key in own:
            raise ValueError(f"--set: must not be {key}, which has an option of its own, --{key.replace('_', '-')}")
        if key in found:
            raise ValueError(f"--set: keys must differ, got {key} twice")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


def split_groups(groups: str) -> tuple[str, ...]:
    """Names with commas between them, and spaces after those.

    >>> split_groups("cat, old dog")
    ('cat', 'old dog')
    """
    return tuple(name.strip() for name in groups.split(","))


@contextmanager
def typed_values() -> Iterator[None]:
    """What was typed and has the wrong type is ValueError, as what is out of range."""
    try:
        yield
    except TypeError as error:
        raise ValueError(str(error)) from error


def _check_first(series: Series, left: Sequence[str]) -> None:
    """Raise, before anything is made, what the model or the operator's options would stop every run by."""
    if left:
        _ = series.start
        with typed_values():
            series.objective(left[0])


def print_cost(series: Series, left: Sequence[str], devices: Sequence[str], together: int) -> None:
    """Print what the runs that are left would cost, from a few measured steps."""
    typer.echo(f"{'runs':<12} {len(left)} of {len(series.names)} to make")
    if not left:
        return
    from guda_fast.counterfactuals.cost import measured

    cost = measured(series, left, device=devices[0], together=together, devices=min(len(devices), len(left)))
    lines = {
        "steps": f"{cost.steps:,}",
        "forwards": f"{cost.rows:,} rows in training, {cost.base_rows:,} of the frozen base",
        "FLOPs": f"{cost.flop:.3g}",
        "memory": f"{cost.state_bytes / 2**20:,.1f} MiB of weights, gradients and moments, "
        f"{cost.activation_bytes / 2**20:,.1f} MiB of activations, in each process",
        "time": f"about {cost.seconds:.3g} s by {', '.join(devices)}",
    }
    for name, value in lines.items():
        typer.echo(f"{name:<12} {value}")
