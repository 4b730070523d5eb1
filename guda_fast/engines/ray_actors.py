"""The engine of Ray: actors score shards and write them."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from guda_fast._validate import check_int, check_real
from guda_fast.engines.crew import Crew, Task, serve
from guda_fast.engines.events import Event, Report
from guda_fast.engines.job import Job
from guda_fast.engines.work import Place, alive, slices
from guda_fast.store import Shard, Store

try:
    import ray
    from ray.exceptions import RayError
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("--engine ray: must have Ray: pip install 'guda_fast[ray]'", name="ray") from error

_ANSWER = 10.0  # seconds for a cluster to answer
_KILL = 2.0  # seconds for a process to end, of which Ray says at once that it has
_GATHER = 2.0  # seconds for which an actor keeps what can wait: to tell takes milliseconds of two processes
_CAN_WAIT = ("step", "waiting")
_LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",  # a machine that audits tells nobody
    # What only a dashboard would show, and takes a twentieth of a core.
    "RAY_enable_metrics_collection": "false",
    "RAY_event_stats": "false",
    "RAY_task_events_report_interval_ms": "0",
}
_OBJECTS = 100 * 2**20  # bytes; what goes between processes are shards' names


class RayActors:
    """Works on a Ray cluster, with actors that hold bank and graph.

    place: when to stop, and how long leases are. actors: how many [one for each share of the cluster's GPUs, or for
    each of its CPUs where it has none]. gpus: of each actor, which may be a fraction [1, or 0 in a cluster without].
    address: of the cluster; None for that of ``RAY_ADDRESS``, or for one that is started on this machine and ended
    with the run. An actor without a GPU has one CPU and one thread.

    An actor takes shards by leases, as the processes of `Local` do, and writes what it scores into the store, so that
    nothing large goes through Ray. What is finished is asked of the store. Actors that are lost are replaced: see
    `Crew`.

    Raises: TypeError, ValueError for another number of actors or GPUs
    """

    def __init__(
        self, place: Place, actors: int | None = None, gpus: float | None = None, address: str | None = None
    ) -> None:
        if actors is not None:
            check_int("RayActors", "actors", actors, 1)
        if gpus is not None:
            check_real("RayActors", "gpus", gpus, 0.0, math.inf)
            if gpus > 1 and gpus != int(gpus):
                raise ValueError(f"RayActors: gpus must be whole where it is above 1, got {gpus}")
        self.place, self._actors, self._gpus, self._address = place, actors, gpus, address

    def run(self, store: Store, job: Job, shards: Sequence[Shard], report: Report) -> None:
        """See `Engine.run`."""
        if not shards:
            return
        with _cluster(self._address):
            pool = _pool(ray.cluster_resources(), self._actors, self._gpus, len(shards))
            device, threads = ("cuda", None) if pool.gpus else ("cpu", 1)
            tasks = [
                Task(store.path, job, device, order, self.place.lease, threads, Path.cwd())
                for order in slices(shards, pool.actors)
            ]
            Crew(store, lambda task: _Handle(task, pool.gpus), _ready, report, self.place).run(tasks)


@dataclass(frozen=True)
class _Pool:
    """So many actors. gpus: of each."""

    actors: int
    gpus: float


def _pool(resources: Mapping[str, float], actors: int | None, gpus: float | None, shards: int) -> _Pool:
    """The actors that a cluster has room for; ValueError where more are asked for."""
    if gpus is None:
        gpus = 1.0 if resources.get("GPU", 0) else 0.0
    kind, each = ("GPU", gpus) if gpus else ("CPU", 1.0)
    # Ray gives fractions of one GPU, not of several together.
    room = int(resources.get(kind, 0) * (1 / each if each > 1 else int(1 / each + 1e-9)))
    wanted = room if actors is None else actors
    if not 1 <= wanted <= room:
        asked = "one" if actors is None else str(actors)
        raise ValueError(
            f"--actors: must fit the cluster, whose {resources.get(kind, 0):g} {kind}s have room for {room} actors of "
            f"{each:g} {kind} each, got {asked}"
        )
    return _Pool(min(wanted, shards), gpus)


class _Actor:
    """A worker: it works in a thread of its own, while the actor's first one streams what it tells.

    With more threads, as for a method that stops it, Ray would look after them a hundred times a second.
    """

    @ray.method(num_returns="streaming")
    def serve(self, task: Task) -> Iterator[list[Event]]:
        told: SimpleQueue[Event | None] = SimpleQueue()

        def work() -> None:
            try:
                serve(task, f"actor of {ray.util.get_node_ip_address()}", told.put, _never)
            finally:
                told.put(None)

        threading.Thread(target=work, daemon=True).start()
        kept: list[Event] = []
        due = 0.0
        for event in iter(told.get, None):
            kept.append(event)
            if event.kind not in _CAN_WAIT or time.monotonic() > due:
                yield kept
                kept, due = [], time.monotonic() + _GATHER


def _never() -> bool:
    """Actors are killed."""
    return False


class _Handle:
    """An actor, as the run sees it. gpus: that it has."""

    def __init__(self, task: Task, gpus: float) -> None:
        # The memory that `keep_freed_memory` keeps is of the C library's first arena, which threads share where told.
        environment = {"env_vars": {"MALLOC_ARENA_MAX": "1"}}
        remote: Any = ray.remote(num_cpus=0 if gpus else 1, num_gpus=gpus, runtime_env=environment)
        self._actor = remote(_Actor).remote()
        self.told = self._actor.serve.remote(task)
        self._death: str | None = None
        self._owner = ""
        self._killed = 0.0  # when, by the monotonic clock

    def events(self) -> Sequence[Event]:
        try:
            events: Sequence[Event] = ray.get(next(self.told))
        except StopIteration as error:
            raise EOFError from error
        except RayError as error:
            self._death = f"was lost ({' '.join(str(error).split())})"
            raise EOFError from error
        self._owner = events[0].worker
        return events

    def death(self) -> str | None:
        return self._death

    def stop(self) -> None:
        if not self._killed:
            ray.kill(self._actor)
            self._killed = time.monotonic()

    def end(self, seconds: float) -> None:
        """It is killed. Until its process is no more it may claim a shard; on another machine that cannot be seen."""
        self.stop()
        while self._owner and alive(self._owner) and time.monotonic() < self._killed + _KILL:
            time.sleep(0.01)


def _ready(handles: Sequence[_Handle], seconds: float) -> Sequence[_Handle]:
    told = {handle.told: handle for handle in handles}
    found, _ = ray.wait(list(told), timeout=seconds)
    if found:  # the first of them; maybe others have told something too
        found, _ = ray.wait(list(told), num_returns=len(told), timeout=0)
    return [told[answer] for answer in found]


def _check_address(address: str | None) -> None:
    """Raise ConnectionError where nothing answers at HOST:PORT, which Ray itself would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"--address: must be that of a Ray cluster, found none at {address} ({error})") from error


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """A connection, to a cluster of this machine alone where none is named; signals stay the caller's."""
    _check_address(address or os.environ.get("RAY_ADDRESS"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address is None and not os.environ.get("RAY_ADDRESS"):
        for name, value in _LOCAL.items():
            os.environ.setdefault(name, value)
        quiet |= {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECTS}
    else:
        quiet |= {"address": address or "auto"}
    ray.init(**quiet)
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()
