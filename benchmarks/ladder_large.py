"""The ladder on the CIFAR-10 networks of 35.7 and 49.07 million parameters: a handful of rows, on two CPU threads.

Dense deltas: merged, low-rank ones leave the same forwards, which are nearly all of the time here. Eight images give
the reference loop, which makes a forward of each timestep, batches as large as everyone's. `vmap` would take minutes a
call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.ladder import TESTS, Job, job_case
from benchmarks.registry import Benchmark, Case

RIVALS = frozenset({"compiled", "bare", "reference"})


def _cases(quick: bool) -> list[Callable[[], Case]]:
    jobs = [
        Job(name, "dense", precision, 1, queries=8, draws=4, batch=8, rivals=RIVALS)
        for name in ("ddpm-cifar10", "guda-cifar10")
        for precision in ("float32", "bfloat16")
    ]
    return [partial(job_case, job, quick) for job in jobs[: len(jobs) // 2 if quick else None]]


BENCHMARK = Benchmark("ladder_large", _cases, TESTS, threads=2, repetitions=3)
