"""Actors of Ray beside processes of the local engine, one thread each: python -m benchmarks.engine_ray OUT.

A row for each number of workers, pass and engine: cells a second between the time when all workers have their models
and the last shard that is done, by the events of the run; and the seconds of all of it, with the start of processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import torch

from benchmarks.engine_job import make_job
from benchmarks.provenance import provenance, write_rows
from guda_fast.engines import Engine, Event, Job, Local, Place, add_queries, open_run
from guda_fast.engines.ray_actors import RayActors


def measure(engine: Engine, job: Job, folder: Path, shard_queries: int) -> dict[str, str]:
    """A run into a new store."""
    store, worker = open_run(folder, job, shard_queries=shard_queries)
    add_queries(store, worker.inputs)
    job = worker.job
    del worker
    told: list[tuple[float, Event]] = []
    begin = time.perf_counter()
    engine.run(store, job, store.shards(), lambda event: told.append((time.perf_counter(), event)))
    seconds = time.perf_counter() - begin
    # Events of Ray come up to half a second late, at the begin as at the end.
    first = max(when for when, event in told if event.kind == "ready")
    done = [(when, event.cells) for when, event in told if event.kind == "done" and when > first]
    scoring = max(when for when, _ in done) - first
    return {
        "cells": f"{sum(cells for _, cells in done):.0f}",
        "scoring_s": f"{scoring:.2f}",
        "cells_per_s": f"{sum(cells for _, cells in done) / scoring:.3f}",
        "whole_s": f"{seconds:.2f}",
    }


def one_pass(job: Job, folder: Path, workers: int, number: int, shard_queries: int) -> list[dict[str, object]]:
    """Both engines once, in an order that alternates."""
    torch.set_num_threads(workers)  # which the processes of the local engine share
    place = Place(lambda: False)
    engines: list[tuple[str, Engine]] = [("local", Local(["cpu"] * workers, place)), ("ray", RayActors(place, workers))]
    return [
        {"engine": name, "workers": workers, "pass": number}
        | measure(engine, job, folder / f"{name}{workers}-{number}", shard_queries)
        for name, engine in engines[:: 1 if number % 2 else -1]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--shard-queries", type=int, default=16)
    parser.add_argument("--stride", type=int, default=20)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 1])
    given = parser.parse_args()
    shared = provenance("cpu") | {"command": f"python -m benchmarks.engine_ray {' '.join(sys.argv[1:])}"}
    # The cluster has room for the most of them, however many cores there are.
    os.environ["RAY_OVERRIDE_RESOURCES"] = f'{{"CPU": {max(given.workers)}}}'
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        job = make_job(Path(name), given.queries, given.stride)
        for workers, number in product(given.workers, range(given.passes)):
            found = one_pass(job, Path(name), workers, number, given.shard_queries)
            rows += [row | shared for row in found]
            print(*found, sep="\n", flush=True)
    for workers in given.workers:
        speed = {
            engine: statistics.median(
                float(str(row["cells_per_s"])) for row in rows if (row["engine"], row["workers"]) == (engine, workers)
            )
            for engine in ("ray", "local")
        }
        print(f"{workers} workers: ray / local {speed['ray'] / speed['local']:.3f} in cells a second, medians")
    write_rows(given.out, rows)


if __name__ == "__main__":
    main()
