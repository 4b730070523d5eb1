"""A series of runs worked through by one process or several, each of which may be killed at any time.

A run is claimed by a lock that ends with its process, continues from its checkpoint, and appears under its name when it
is whole. So the same command goes on where it stopped, and more processes, also of another command, share the work.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from guda_fast._files import atomic_write
from guda_fast._json import read_object
from guda_fast._validate import check_int
from guda_fast.counterfactuals.locks import Claim, claim
from guda_fast.counterfactuals.objective import Objective
from guda_fast.counterfactuals.recipes import Series
from guda_fast.counterfactuals.runs import RECORD, finished, save_run
from guda_fast.counterfactuals.trainer import TrainResult, train_together
from guda_fast.errors import MENDABLE, CheckpointError

# What ends one run and not the others. An argument of another type comes from the caller's options.
_FAILURES = (*MENDABLE, TypeError, torch.OutOfMemoryError)
_PATIENCE = 0.5  # seconds between looks at what other processes have claimed
_EVENTS_A_SECOND = 5.0


@dataclass(frozen=True)
class Event:
    """What happened to a run.

    kind: "step" (``done`` of ``steps``), "finished" (``text`` says why it ended early, if it did), "failed" (``text``
        says why), "waiting": everything that is left is being made by other processes, or "ended": a worker process
        (``name`` has its device), before its time (``text`` says why)
    """

    kind: str
    name: str = ""
    done: int = 0
    steps: int = 0
    text: str = ""


Listener = Callable[[Event], object]


@dataclass(frozen=True)
class Place:
    """Where runs are: finished ones in ``out``, by name; what is not finished in a hidden folder there."""

    out: Path

    @property
    def hidden(self) -> Path:
        """Gone when nothing is unfinished."""
        return self.out / ".runs"

    def folder(self, name: str) -> Path:
        """Of a finished run."""
        return self.out / name

    def work(self, name: str) -> Path:
        """Checkpoint and log of a run."""
        return self.hidden / name

    def lock(self, name: str) -> Path:
        """The lock file of a run."""
        return self.hidden / f"{name}.lock"

    def failure(self, name: str) -> Path:
        """Why a run failed."""
        return self.hidden / f"{name}.failed"

    def tidy(self, done: Iterable[str] = ()) -> None:
        """Remove what a process that was killed left of finished runs, and the hidden folder where nothing is in it."""
        for name in done:
            if not any(left.exists() for left in (self.work(name), self.lock(name), self.failure(name))):
                continue
            mine = claim(self.lock(name))
            if mine is not None:
                with mine:
                    shutil.rmtree(self.work(name), ignore_errors=True)
                    self.failure(name).unlink(missing_ok=True)
        with suppress(OSError):
            self.hidden.rmdir()


@dataclass(frozen=True)
class How:
    """How a worker works; what it makes does not depend on it, but for the rounding of devices and batched forwards.

    device: of the training. together: runs in one loop [>= 1].
    checkpoint_every: steps from one checkpoint to the next [>= 1; None for none, and nothing to go on from].
    """

    device: str = "cpu"
    together: int = 1
    checkpoint_every: int | None = 100

    def __post_init__(self) -> None:
        check_int("How", "together", self.together, 1)
        if self.checkpoint_every is not None:
            check_int("How", "checkpoint_every", self.checkpoint_every, 1)


class Worker:
    """Makes the runs of a series that nobody else makes, until none is left.

    series: what to make. place: where. listen: called with events. how: see there.
    token: of the command: a run that failed is not tried twice by one command.
    """

    def __init__(self, series: Series, place: Place, listen: Listener, token: str, how: How) -> None:
        self.series, self.place, self.token, self.how = series, place, token, how
        self._listen = listen
        self._done: set[str] = set()  # so that records are read once
        self._steps_heard: dict[str, float] = {}

    def run(self) -> None:
        """Make what is left, and wait for what others make: what they leave unfinished is made here.

        A run that fails does not stop the others; ``failures_of`` says why it did.
        """
        while True:
            with ExitStack() as held:
                claims, others = self._claimed(held)
                if claims:
                    self._make(claims)
            if not claims:
                if not others:
                    return
                self._listen(Event("waiting"))
                time.sleep(_PATIENCE)

    def _claimed(self, held: ExitStack) -> tuple[list[str], bool]:
        """Runs that are claimed now, all trained in one way; and whether somebody else has claimed others."""
        claims: list[str] = []
        others = False
        for name in self.series.names:
            if len(claims) == self.how.together:
                break
            if self._settled(name) or (claims and self.series.config(name) != self.series.config(claims[0])):
                continue
            mine: Claim | None = claim(self.place.lock(name))
            if mine is None:
                others = True
            elif self._settled(name):  # by who held it until now
                mine.release()
            else:
                held.enter_context(mine)
                claims.append(name)
        return claims, others

    def _settled(self, name: str) -> bool:
        if name not in self._done:
            try:
                settled = _failure(self.place, name, self.token) is not None or finished(
                    self.place.folder(name), self.series.settings(name)
                )
            except CheckpointError as error:  # what came there since the command began
                self._fail(name, error)
                settled = True
            if settled:
                self._done.add(name)
        return name in self._done

    def _make(self, names: Sequence[str]) -> None:
        objectives: dict[str, Objective] = {}
        for name in names:
            try:
                objectives[name] = self.series.objective(name)
            except _FAILURES as error:
                self._fail(name, error)
        if not objectives:
            return
        for name, result in self._trained(objectives).items():
            try:
                if isinstance(result, Exception):
                    raise result
                self._keep(name, result)
            except _FAILURES as error:
                self._fail(name, error)

    def _trained(self, objectives: Mapping[str, Objective]) -> Mapping[str, TrainResult | Exception]:
        names = list(objectives)
        every = self.how.checkpoint_every
        identities = {name: json.dumps(self.series.settings(name), sort_keys=True) for name in names}
        try:
            return train_together(
                self.series.start,
                objectives,
                self.series.config(names[0]),
                device=self.how.device,
                work=None if every is None else {name: self.place.work(name) for name in names},
                identity=identities,
                checkpoint_every=every or 1,
                progress=self._step,
            )
        except _FAILURES as error:
            return dict.fromkeys(names, error)

    def _step(self, name: str, done: int, steps: int) -> None:
        now = time.monotonic()
        if done == steps or now - self._steps_heard.get(name, 0.0) > 1 / _EVENTS_A_SECOND:
            self._steps_heard[name] = now
            self._listen(Event("step", name, done, steps))

    def _keep(self, name: str, result: TrainResult) -> None:
        # What is half written is in the run's own folder: who goes on after a kill removes it with the checkpoint.
        work, folder = self.place.work(name), self.place.folder(name)
        try:
            save_run(
                folder,
                lambda temporary: self.series.write(name, result, temporary),
                self.series.settings(name),
                result.losses,
                result.seconds,
                within=work,
                steps=result.steps,
                stopped=result.stopped,
            )
            self.place.failure(name).unlink(missing_ok=True)  # of a command that was killed
        finally:
            if self.how.checkpoint_every is None or (folder / RECORD).exists():
                shutil.rmtree(work, ignore_errors=True)
        self._listen(Event("finished", name, text=result.stopped or ""))

    def _fail(self, name: str, error: BaseException) -> None:
        text = str(error) or type(error).__name__
        self._done.add(name)  # also where the note cannot be written
        with suppress(OSError), atomic_write(self.place.failure(name), "w") as file:
            json.dump({"command": self.token, "error": text}, file)
        self._listen(Event("failed", name, text=text))


def complete(series: Series, out: Path, listen: Listener) -> None:
    """Make all runs of a series that are not finished, in this process and without checkpoints: for short ones.

    Raises ValueError where a run fails, after the others; CheckpointError where a finished one has other settings.
    """
    place, token = Place(out), secrets.token_hex(8)
    for name in series.names:
        finished(place.folder(name), series.settings(name))
    try:
        Worker(series, place, listen, token, How(checkpoint_every=None)).run()
        failures = failures_of(series, place, token)
        place.tidy(name for name in series.names if name not in failures)
    finally:
        place.tidy()
    if failures:
        raise ValueError("; ".join(f"{name}: {text}" for name, text in failures.items()))


def failures_of(series: Series, place: Place, token: str) -> dict[str, str]:
    """Of a command whose workers have ended: why each run is not there that is not. Removes the notes of failures."""
    found: dict[str, str] = {}
    for name in series.names:
        failed = _failure(place, name, token)
        if failed is not None:
            found[name] = failed
            place.failure(name).unlink(missing_ok=True)
            continue
        try:
            if not finished(place.folder(name), series.settings(name)):
                found[name] = "its process ended before it was finished; the same command goes on with it"
        except CheckpointError as error:
            found[name] = str(error)
    return found


def _failure(place: Place, name: str, token: str) -> str | None:
    """Why a run failed in this command."""
    try:
        found = read_object(place.failure(name))
    except (OSError, ValueError):  # none, or half of one, of a disk that is full
        return None
    return str(found.get("error")) if found.get("command") == token else None
