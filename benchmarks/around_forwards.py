"""What the swap plan's time is made of, in one run: python -m benchmarks.around_forwards OUT.

The clock is read before and after every forward of a whole job, which gives the time in forwards and around them in
the same seconds; `bare forwards` of the ladder are as many of them on one batch that stays in the cache, at another
moment. A row for each job and pass, at the length of a protocol.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ladder import DTYPES, Job, Ours
from benchmarks.provenance import provenance, write_rows
from benchmarks.rivals import BareForwards
from benchmarks.workloads import FORMS, make_workload


class Timed:
    """The resident model, with the seconds of its calls."""

    def __init__(self, forward: Any) -> None:
        self.seconds, self._forward = 0.0, forward

    def __call__(self, *inputs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self._forward(*inputs)
        finally:
            self.seconds += time.perf_counter() - begin

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward, name)


def jobs() -> list[Job]:
    """99 draws of 64 queries where a forward is short, and as many forwards of fewer queries where it is long."""
    kinds = [*((form, "float32") for form in FORMS), *((form, "bfloat16") for form in FORMS)]
    return [
        Job(architecture, form, precision, 2, queries=queries, draws=draws, batch=64)
        for architecture, queries, draws in (("digits", 64, 99), ("rgb32", 16, 40))
        for form, precision in kinds
    ]


def measure(job: Job, passes: int) -> list[dict[str, object]]:
    """A row a pass, after one that is not counted."""
    workload = make_workload(job.architecture, job.form, models=job.models, queries=job.queries, draws=job.draws)
    ours = Ours(workload, job.precision, job.batch, "cpu")
    swap = ours.engine.swap
    shape = (job.batch, *workload.queries.shape[1:])
    batches = workload.models * -(-workload.rows // job.batch)
    bare = BareForwards(ours.forward, shape, batches=batches, dtype=DTYPES[job.precision])
    rows = []
    plain = swap.forward
    for number in range(passes + 1):
        timed = Timed(plain)
        swap.forward = timed  # type: ignore[assignment]
        begin = time.perf_counter()
        ours.scores()
        whole = time.perf_counter() - begin
        swap.forward = plain
        begin = time.perf_counter()
        bare.run()
        alone = time.perf_counter() - begin
        if number:
            rows.append(_row(job, batches, number, whole, timed.seconds, alone))
    return rows


def _row(job: Job, batches: int, number: int, whole: float, inside: float, alone: float) -> dict[str, object]:
    return {
        "job": str(job),
        "dtype": job.precision,
        "threads": torch.get_num_threads(),
        "forwards": batches,
        "pass": number,
        "whole_s": f"{whole:.4f}",
        "in_forwards_s": f"{inside:.4f}",
        "bare_forwards_s": f"{alone:.4f}",
        "around": f"{whole / inside - 1:.4f}",
        "over_bare": f"{whole / alone - 1:.4f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--passes", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(2)
    shared = provenance("cpu") | {"command": f"python -m benchmarks.around_forwards {' '.join(sys.argv[1:])}"}
    rows: list[dict[str, object]] = []
    for job in jobs():
        found = measure(job, given.passes)
        rows += [row | shared for row in found]
        shares = {name: statistics.median(float(str(row[name])) for row in found) for name in ("around", "over_bare")}
        print(f"{job}, {job.precision}: {shares['around']:.2%} around, {shares['over_bare']:.2%} over bare", flush=True)
    write_rows(given.out, rows)


if __name__ == "__main__":
    main()
