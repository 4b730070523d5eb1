"""The loop of every process that works on a store: claim a shard, score it, write it; until nothing is left."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from guda_fast.engines.events import Event, Report
from guda_fast.engines.worker import Worker
from guda_fast.errors import CancelledError
from guda_fast.store import Lease, Shard, Store

LEASE = 300.0
"""Seconds after which the shard of a process that does not advance is taken by others."""
_RENEWALS = 4  # a lease
_TELL = 0.5  # seconds between events about one shard
_POLL = (0.2, 5.0)  # seconds between looks at shards that others have, at first and at most


@dataclass
class Place:
    """Who works, and until when. stop: asked after every batch. lease: seconds [> 0]."""

    stop: Callable[[], bool]
    lease: float = LEASE


def work(worker: Worker, store: Store, shards: Sequence[Shard], report: Report, place: Place) -> None:
    """Score those of the shards that nobody else does, in this order, and at last those that others gave up.

    Returns when all are finished, by whoever. Raises CancelledError where ``place.stop`` says so: the shard at hand is
    dropped. Whatever a worker raises ends the work, with its lease released.
    """
    waits = _POLL[0]
    left = list(shards)
    while left:
        before = len(left)
        for shard in left:
            attempt(worker, store, shard, report, place)
        left = [shard for shard in left if not store.finished(shard)]
        if len(left) < before:
            waits = _POLL[0]
        elif left:
            report(Event("waiting", me(), cells=sum(shard.cells for shard in left)))
            _sleep(waits, place)
            waits = min(2 * waits, _POLL[1])


def attempt(worker: Worker, store: Store, shard: Shard, report: Report, place: Place) -> None:
    """Score a shard, unless it is finished or another process does; raises as `work` does."""
    _check(place)
    lease = _claimed(store, shard, place.lease)
    if lease is not None:
        with lease:
            _score(worker, store, shard, lease, report, place)


def _score(worker: Worker, store: Store, shard: Shard, lease: Lease, report: Report, place: Place) -> None:
    begin = renewed = told = time.monotonic()
    done, most = 0, worker.forwards(store, shard)
    report(Event("begun", me(), shard.name))

    def advance(forwards: int) -> None:
        nonlocal renewed, told, done
        now = time.monotonic()
        done += forwards
        if now - renewed > place.lease / _RENEWALS:
            lease.renew()  # also where another one has it by now, which may be slower
            renewed = now
        if now - told > _TELL:
            report(Event("step", me(), shard.name, shard.cells * min(1.0, done / most)))
            told = now
        _check(place)

    result = worker.score(store, shard, advance)
    written = store.write(shard, result)
    seconds = time.monotonic() - begin
    report(Event("done" if written else "dropped", me(), shard.name, shard.cells, seconds))


def _check(place: Place) -> None:
    if place.stop():
        raise CancelledError("the run was asked to stop")


def _sleep(seconds: float, place: Place) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        _check(place)
        time.sleep(min(left, 0.1))


def _claimed(store: Store, shard: Shard, seconds: float) -> Lease | None:
    """The lease of a shard, also in the place of a process of this machine that is no more."""
    lease = store.claim(shard, me(), seconds)
    if lease is not None or store.finished(shard):
        return lease
    gone = {owner for claimed, owner in store.leases() if claimed == shard and not alive(owner)}
    for owner in gone:
        store.revoke(owner)
    return store.claim(shard, me(), seconds) if gone else None


def slices(shards: Sequence[Shard], count: int) -> list[list[Shard]]:
    """The order of the shards for each of so many processes: its own slice first, then the others' from their ends.

    What is left of a slice when another process comes to it is what its own process would do last.

    >>> shards = [Shard(range(row, row + 1), range(1)) for row in range(4)]
    >>> [[shard.queries.start for shard in order] for order in slices(shards, 2)]
    [[0, 1, 3, 2], [2, 3, 1, 0]]
    """
    edges = [round(len(shards) * part / count) for part in range(count + 1)]
    own = [list(shards[begin:end]) for begin, end in pairwise(edges)]
    return [
        own[part] + [shard for other in own[part + 1 :] + own[:part] for shard in other[::-1]] for part in range(count)
    ]


def me() -> str:
    """This process, as the owner of leases: host, process namespace, process, and when that began."""
    _, began = _status(os.getpid())
    return f"{_here()}:{os.getpid()}:{began}"


def alive(owner: str) -> bool:
    """Whether a process may still be there: of other machines it is not known."""
    here, _, rest = owner.rpartition(":")[0].rpartition(":")
    if here != _here() or not rest.isdecimal():
        return True
    try:
        os.kill(int(rest), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    state, began = _status(int(rest))
    return state != "Z" and owner.rpartition(":")[2] == began  # Z: it has ended, and nobody has asked how


def _here() -> str:
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino  # containers may share a host's name
    except OSError:
        namespace = 0
    return f"{socket.gethostname()}:{namespace}"


def _status(process: int) -> tuple[str, str]:
    """The state of a process, a letter, and when it began, in the kernel's ticks: numbers of processes come again."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", "0"
    fields = status.rpartition(")")[2].split()
    return fields[0], fields[19]
