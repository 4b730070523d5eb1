"""Time of shards scored into a store beside the same forwards alone: python -m benchmarks.engine_overhead OUT.

A row for each size of a part: seconds of a run (decoding, leases, scores, parts, events), seconds of its estimator
alone on the same queries, and what the first has more, by the clock and by the time of the CPUs. Passes alternate, and
medians are compared; spread is that of the estimator alone, slowest over fastest. Where it is large, `outside` says
more: the median over runs of the time outside of the estimator, and in what it calls back, beside the time inside in
the same run. That does not see what a run costs the estimator, as by a colder cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from benchmarks.engine_job import GROUPS, make_job
from benchmarks.provenance import provenance, write_rows
from guda_fast.datasets.queries import QuerySet
from guda_fast.engines import Job, Log, Monitor, Place, Worker, add_queries, open_run, work
from guda_fast.estimators import Full
from guda_fast.estimators.cells import Cells
from guda_fast.estimators.differences import BoolArray
from guda_fast.forward import Advance, Engine


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the CPUs."""
    begin = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


@contextmanager
def inside() -> Iterator[list[float]]:
    """Seconds that runs of the estimator take, each less what it spends in ``advance``."""
    spent: list[float] = []
    plain = Full.run

    def run(
        self: Full, engine: Engine, queries: QuerySet, advance: Advance, candidates: BoolArray | None = None
    ) -> Cells:
        begin, back = time.perf_counter(), 0.0

        def told(forwards: int) -> None:
            nonlocal back
            called = time.perf_counter()
            advance(forwards)
            back += time.perf_counter() - called

        cells = plain(self, engine, queries, told, candidates)
        spent.append(time.perf_counter() - begin - back)
        return cells

    with mock.patch.object(Full, "run", run):
        yield spent


def run_seconds(worker: Worker, store: Path, job: Job, shard_queries: int) -> tuple[float, float, float]:
    """Of all shards, as a process of a run works on them; reading the images to add them is not among it.

    By the clock, of the CPUs, and by the clock inside of the estimator.
    """
    made, _ = open_run(store, job, shard_queries=shard_queries)
    add_queries(made, worker.inputs)
    shards = made.shards()

    def run() -> None:
        with (
            Log(store / "log.jsonl") as log,
            Monitor(made, shards, log, metrics=store / "m.prom", shown=False) as monitor,
        ):
            work(worker, made, shards, monitor, Place(lambda: False))

    with inside() as spent:
        clock, cpus = timed(run)
    return clock, cpus, sum(spent)


def alone_seconds(worker: Worker, shard_queries: int) -> tuple[float, float]:
    """Of the estimator on the same shards, with their queries in memory."""
    count = len(worker.inputs.stream)
    pieces = [
        worker.inputs.loaded([worker.inputs.stream.piece(range(row, min(row + shard_queries, count)))])
        for row in range(0, count, shard_queries)
    ]
    engine, estimator = worker.prepared.engine, worker.job.estimator
    return timed(lambda: [estimator.run(engine, queries, lambda forwards: None) for queries in pieces])


def measure(worker: Worker, folder: Path, part: int, passes: int) -> dict[str, object]:
    runs, alone = [], []
    for number in range(passes):
        alone.append(alone_seconds(worker, part))
        runs.append(run_seconds(worker, folder / f"store{part}-{number}", worker.job, part))
    whole, whole_cpu, _ = map(statistics.median, zip(*runs, strict=True))
    forwards, forwards_cpu = map(statistics.median, zip(*alone, strict=True))
    return {
        "part": part,
        "run_s": f"{whole:.3f}",
        "alone_s": f"{forwards:.3f}",
        "overhead": f"{whole / forwards - 1:.4f}",
        "overhead_cpu": f"{whole_cpu / forwards_cpu - 1:.4f}",
        "outside": f"{statistics.median(clock / within - 1 for clock, _, within in runs):.4f}",
        "spread": f"{max(one for one, _ in alone) / min(one for one, _ in alone) - 1:.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--stride", type=int, default=20)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--parts", type=int, nargs="+", default=[16, 64, 128])
    given = parser.parse_args()
    shared = provenance("cpu") | {"command": f"python -m benchmarks.engine_overhead {' '.join(sys.argv[1:])}"}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        worker = Worker(make_job(Path(name), given.queries, given.stride))
        worker.job.estimator.run(worker.prepared.engine, worker.inputs.few(), lambda forwards: None)
        size = {"queries": given.queries, "groups": GROUPS, "draws": worker.inputs.protocol.draws}
        for part in given.parts:
            found = size | measure(worker, Path(name), part, given.passes) | {"threads": torch.get_num_threads()}
            rows.append(found | shared)
            print(found, flush=True)
    write_rows(given.out, rows)


if __name__ == "__main__":
    main()
