"""Crew: the workers of a run that are not this process, whom it starts, hears, replaces and ends."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from guda_fast._memory import keep_freed_memory
from guda_fast.engines.events import Event, Report
from guda_fast.engines.job import Job
from guda_fast.engines.work import Place, me, work
from guda_fast.engines.worker import Worker
from guda_fast.errors import MENDABLE, CancelledError, WorkerError
from guda_fast.store import Shard, Store

_DEATHS = 3  # at least, without a shard between them, after which it is not chance
_TICK = 0.5  # seconds in which a wish to stop is noticed
_PATIENCE = 30.0  # seconds for all workers to drop their shards


@dataclass(frozen=True)
class Task:
    """What a worker elsewhere needs to know; can be pickled.

    shards: in its order. lease: seconds. threads: of the CPU; None for as many as there are.
    folder: that relative paths are of.
    """

    store: Path
    job: Job
    device: str
    shards: list[Shard]
    lease: float
    threads: int | None
    folder: Path


class Member(Protocol):
    """A worker elsewhere, as the run sees it."""

    def events(self) -> Sequence[Event]:
        """What it told; waits for something. Raises EOFError when it has ended."""
        ...

    def death(self) -> str | None:
        """How it ended, once it has; None where it had nothing left to do."""
        ...

    def stop(self) -> None:
        """Ask it to drop its shard and end, or end it."""
        ...

    def end(self, seconds: float) -> None:
        """Wait so long for its end, and then kill it."""
        ...


M = TypeVar("M", bound=Member)


class Crew(Generic[M]):
    """Workers that share the shards of a run by leases.

    store: where the leases are. start: a worker of a task. wait: returns those of some workers that have something to
    tell, after so many seconds at most. report: called with what they tell. place: when to stop.

    Who dies is replaced, and the others take the shard meanwhile; after three deaths, or one more than there are
    workers, without a finished shard between them the run ends.
    """

    def __init__(
        self,
        store: Store,
        start: Callable[[Task], M],
        wait: Callable[[Sequence[M], float], Sequence[M]],
        report: Report,
        place: Place,
    ) -> None:
        self._store, self._start, self._wait, self._report, self._place = store, start, wait, report, place
        self._tasks: dict[M, Task] = {}
        self._owners: dict[M, str] = {}  # of those that have their models
        self._left: set[str] = set()
        self._deaths = self._most_deaths = 0

    def run(self, tasks: Sequence[Task]) -> None:
        """One worker a task. Raises CancelledError, and WorkerError with what a worker said."""
        self._left = {shard.name for task in tasks for shard in task.shards}
        self._most_deaths = max(_DEATHS, len(tasks) + 1)  # all of a machine's may die at once
        try:
            for task in tasks:
                self._tasks[self._start(task)] = task
            while self._tasks and self._left:
                if self._place.stop():
                    raise CancelledError("the run was asked to stop")
                for member in self._wait(list(self._tasks), _TICK):
                    self._hear(member)
        finally:
            self._end()

    def _hear(self, member: M) -> None:
        try:
            events = member.events()
        except EOFError:
            self._gone(member)
            return
        for event in events:
            self._report(event)
            if event.kind == "ready":
                self._owners[member] = event.worker
            if event.kind == "failed":
                raise WorkerError(event.text)
            if event.kind in ("done", "dropped"):
                self._left.discard(event.shard)
                self._deaths = 0

    def _gone(self, member: M) -> None:
        """A worker has ended: it is done, or is replaced."""
        task, owner = self._tasks.pop(member), self._owners.pop(member, "")
        death = member.death()
        self._bury(member, owner)
        if death is None:
            return
        self._deaths += 1
        why = f"worker on {task.device} {death}"
        self._report(Event("died", owner, text=why))
        if self._deaths >= self._most_deaths:
            raise WorkerError(f"{why}, {self._deaths} times without a finished shard; memory may have run out")
        self._tasks[self._start(task)] = task

    def _end(self) -> None:
        """Let those at work drop their shards; who has none yet, or does not listen, is killed."""
        for member in self._tasks:
            member.stop()
        end = time.monotonic() + _PATIENCE
        for member in sorted(self._tasks, key=self._owners.__contains__):  # first those without models
            owner = self._owners.get(member, "")
            self._bury(member, owner, max(0.0, end - time.monotonic()) if owner else 0.0)

    def _bury(self, member: M, owner: str, seconds: float = 0.0) -> None:
        member.end(seconds)
        if owner:
            self._store.revoke(owner)  # on another machine its lease would have to expire


def serve(task: Task, where: str, tell: Report, stop: Callable[[], bool]) -> bool:
    """What a worker elsewhere does: all of a task, telling what happens; returns whether nothing went wrong.

    where: it works, for people. stop: asked after every batch.
    """
    keep_freed_memory()
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    try:
        os.chdir(task.folder)
        store = Store.open(task.store)
        worker = Worker(task.job, task.device)
        tell(Event("ready", me(), text=where))
        work(worker, store, task.shards, tell, Place(stop, task.lease))
    except CancelledError:
        return True
    except MENDABLE as error:
        tell(Event("failed", me(), text=str(error) or type(error).__name__))
        return False
    except Exception:  # noqa: BLE001 (the run shows it, and ends)
        tell(Event("failed", me(), text=traceback.format_exc()))
        return False
    return True
