"""The ladder on the CIFAR-10 networks of 35.7 and 49.07 million parameters: a handful of rows, on two CPU threads.

Forwards are nearly all of the time here, and low-rank deltas change them for PEFT alone: with those, only PEFT and the
compiled rival run. Eight images at one timestep give the reference loop, which makes a forward of each timestep,
batches as large as everyone's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.ladder import ALL, TESTS, Job, job_case
from benchmarks.registry import Benchmark, Case
from benchmarks.workloads import FORMS

ON_LOW_RANK = frozenset({"compiled", "peft"})


def _cases(quick: bool) -> list[Callable[[], Case]]:
    jobs = [
        Job(name, form, precision, 1, queries=8, draws=1, batch=8, rivals=ALL if form == "dense" else ON_LOW_RANK)
        for name in ("ddpm-cifar10", "guda-cifar10")
        for precision in ("float32", "bfloat16")
        for form in FORMS
    ]
    return [partial(job_case, job, quick) for job in jobs[: len(jobs) // 2 if quick else None]]


BENCHMARK = Benchmark("ladder_large", _cases, TESTS, threads=2, repetitions=3)
