"""The crew of a run, with workers that follow a script: who is replaced, when it gives up, what is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from guda_fast.engines import Event, Place
from guda_fast.engines.crew import Crew, Task
from guda_fast.errors import CancelledError, WorkerError
from guda_fast.store import Shard

SHARDS = [Shard(range(row, row + 1), range(1)) for row in range(2)]
DIES, ENDS = "dies", "ends"


@dataclass
class Revoked:
    """In place of a store."""

    owners: list[str] = field(default_factory=list)

    def revoke(self, owner: str) -> None:
        self.owners.append(owner)


@dataclass(eq=False)
class Scripted:
    """A worker that tells the events of a script; without DIES or ENDS at the end it goes on and tells nothing more."""

    script: list[Event | str]
    ended: list[float] = field(default_factory=list)
    stopped: bool = False

    def events(self) -> Sequence[Event]:
        event = self.script[0]
        if isinstance(event, str):
            raise EOFError
        return [self.script.pop(0)]  # type: ignore[list-item]

    def death(self) -> str | None:
        return "ended with signal SIGKILL" if self.script == [DIES] else None

    def stop(self) -> None:
        self.stopped = True

    def end(self, seconds: float) -> None:
        self.ended.append(seconds)


class Scene:
    """A crew whose workers have the scripts in turn, and the last one from then on."""

    def __init__(self, *scripts: Sequence[Event | str], workers: int = 1, stop: Callable[[], bool] = bool) -> None:
        self.members: list[Scripted] = []
        self.told: list[Event] = []
        self.store = Revoked()
        self._scripts, self._workers, self._place = scripts, workers, Place(stop)

    def run(self) -> None:
        store: Any = self.store
        task = Task(Path(), None, "cpu", SHARDS, 1.0, None, Path())  # type: ignore[arg-type]
        Crew(store, self._start, self._wait, self.told.append, self._place).run([task] * self._workers)

    def _start(self, task: Task) -> Scripted:
        script = self._scripts[min(len(self.members), len(self._scripts) - 1)]
        self.members.append(Scripted(list(script)))
        return self.members[-1]

    @staticmethod
    def _wait(members: Sequence[Scripted], seconds: float) -> Sequence[Scripted]:
        return [member for member in members if member.script]


def ready(owner: str) -> Event:
    return Event("ready", owner)


def done(number: int) -> Event:
    return Event("done", "any", SHARDS[number].name)


def test_who_dies_is_replaced_and_its_lease_given_back() -> None:
    scene = Scene([ready("first"), done(0), DIES], [ready("second"), done(1)])
    scene.run()
    assert [member.script for member in scene.members] == [[DIES], []]
    assert [(event.kind, event.worker) for event in scene.told if event.kind != "done"] == [
        ("ready", "first"),
        ("died", "first"),
        ("ready", "second"),
    ]
    assert scene.told[2].text == "worker on cpu ended with signal SIGKILL"
    assert scene.store.owners == ["first", "second"]
    assert [len(member.ended) for member in scene.members] == [1, 1]
    assert scene.members[1].stopped and scene.members[1].ended[0] > 0  # it may have a shard to drop


def test_who_has_nothing_left_to_do_is_not_replaced() -> None:
    scene = Scene([ready("only"), ENDS])
    scene.run()
    assert len(scene.members) == 1 and [event.kind for event in scene.told] == ["ready"]


@pytest.mark.parametrize(("workers", "deaths"), [(1, 3), (2, 3), (3, 4), (8, 9)])
def test_deaths_in_a_row_end_the_run(workers: int, deaths: int) -> None:
    """All workers of a machine may die at once, and once more."""
    scene = Scene([DIES], workers=workers)
    with pytest.raises(WorkerError, match=rf"worker on cpu ended with signal SIGKILL, {deaths} times without"):
        scene.run()
    assert [event.kind for event in scene.told] == ["died"] * deaths
    assert len(scene.members) == workers + deaths - 1
    assert all(len(member.ended) == 1 for member in scene.members)


def test_a_finished_shard_between_deaths_counts() -> None:
    scene = Scene([DIES], [DIES], [done(0), DIES], [DIES], [done(1)])
    scene.run()
    assert [event.kind for event in scene.told].count("died") == 4


def test_a_failure_ends_the_run_with_its_text() -> None:
    scene = Scene([ready("first"), Event("failed", "first", text="weights: too short")], [ready("second")], workers=2)
    with pytest.raises(WorkerError, match="^weights: too short$"):
        scene.run()
    assert all(member.stopped and member.ended for member in scene.members)
    assert scene.told[-1].kind == "failed"


def test_a_stop_gives_time_to_those_at_work_and_none_to_those_that_load() -> None:
    answers: Iterator[bool] = iter([False, True])
    scene = Scene([], [ready("second")], workers=2, stop=lambda: next(answers))
    with pytest.raises(CancelledError):
        scene.run()
    loading, working = scene.members
    assert loading.ended == [0.0] and working.ended[0] > 10
    assert scene.store.owners == ["second"]
