"""The engine against the reference loop at the length of a protocol: 64 images of 3x32x32 at 99 timesteps, batch 64.

`ladder` compares them in a job of two timesteps. Ratios are against the reference loop, which computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from benchmarks.ladder import TESTS, Job, job_case
from benchmarks.registry import Benchmark, Case


def _case(job: Job, quick: bool) -> Case:
    case = job_case(job, quick)
    (reference,) = case.contenders
    return replace(case, rival=reference, contenders=[case.rival])


def _cases(quick: bool) -> list[Callable[[], Case]]:
    jobs = [
        Job("rgb32", "dense", precision, 2, queries=64, draws=99, batch=64, rivals=frozenset({"reference"}))
        for precision in ("float32", "bfloat16")
    ]
    return [partial(_case, job, quick) for job in jobs]


BENCHMARK = Benchmark("ladder_reference", _cases, TESTS, threads=2, repetitions=3)
