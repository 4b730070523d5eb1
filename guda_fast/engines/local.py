"""The engine of one machine: this process for one device, and one process a device for several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from guda_fast.engines.crew import Crew, Task, serve
from guda_fast.engines.events import Event, Report
from guda_fast.engines.job import Job
from guda_fast.engines.work import Place, me, slices, work
from guda_fast.engines.worker import Worker
from guda_fast.store import Shard, Store


class Local:
    """Works on the devices of this machine.

    devices: "cpu", "cuda:0" ...; several, of which "cpu" may come more than once, get a process each, which share the
        CPU's threads. place: when to stop, and how long leases are. worker: where there is one already, it works for a
        single device.

    A process that is killed is started again, and the others take its shard meanwhile: see `Crew`. An error of a worker
    ends the run with its text.
    """

    def __init__(self, devices: Sequence[str], place: Place, worker: Worker | None = None) -> None:
        self.devices, self.place, self._worker = tuple(devices), place, worker

    def run(self, store: Store, job: Job, shards: Sequence[Shard], report: Report) -> None:
        """See `Engine.run`."""
        if len(self.devices) == 1:
            worker = self._worker or Worker(job, self.devices[0])
            report(Event("ready", me()))
            work(worker, store, shards, report, self.place)
            return
        self._worker = None  # its memory is for the processes
        sharing = self.devices.count("cpu")
        threads = max(1, torch.get_num_threads() // sharing) if sharing else None
        orders = slices(shards, len(self.devices))
        tasks = [
            Task(store.path, job, device, order, self.place.lease, threads, Path.cwd())
            for device, order in zip(self.devices, orders, strict=True)
        ]
        Crew(store, _Process, _ready, report, self.place).run(tasks)


class _Process:
    """A process of this machine, at the other end of a pipe."""

    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(task, theirs), name=f"guda-fast {task.device}", daemon=True
        )
        self._process.start()
        theirs.close()  # or the end of the process would not be seen here

    def events(self) -> Sequence[Event]:
        try:
            return [self.pipe.recv()]
        except (EOFError, OSError) as error:
            self.pipe.close()
            raise EOFError from error

    def death(self) -> str | None:
        self._process.join()
        code = self._process.exitcode or 0
        if code < 0:
            return f"ended with signal {signal.Signals(-code).name}"
        return f"ended with exit status {code}" if code else None

    def stop(self) -> None:
        with suppress(OSError):  # it has ended
            self.pipe.send("stop")

    def end(self, seconds: float) -> None:
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.pipe.close()


def _ready(processes: Sequence[_Process], seconds: float) -> Sequence[_Process]:
    pipes = {process.pipe: process for process in processes}
    return [pipes[pipe] for pipe in wait(list(pipes), seconds)]  # type: ignore[index]


def _serve(task: Task, pipe: Connection[Any, Any]) -> None:
    """A worker process. Signals that end a run are the first process's to handle, and its end is this one's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def send(event: Event) -> None:
        try:
            pipe.send(event)
        except OSError:
            os._exit(1)  # nobody is there; no exception, which a retry might swallow

    sys.exit(0 if serve(task, task.device, send, pipe.poll) else 1)
