"""The ladder on a GPU: the networks of CIFAR-10 and of Stable Diffusion 1.5, in batches that fill it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.ladder import ALL, Job, job_case
from benchmarks.projection import PUBLISHED
from benchmarks.registry import Benchmark, Case

# vmap runs on the smallest job alone, for its grouped convolutions take minutes elsewhere.
USUAL = ALL - {"vmap"}

# Captured graphs. "max-autotune-no-cudagraphs" spends more minutes on choosing kernels than there are for everything.
MODE = "reduce-overhead"


def _cases(quick: bool) -> list[Callable[[], Case]]:
    def cifar(form: str, precision: str, rivals: frozenset[str] = USUAL) -> Job:
        return Job(PUBLISHED, form, precision, models=2, queries=64, draws=24, batch=512, rivals=rivals)

    # The most wanted first: a run may be out of time before the last.
    jobs = [
        cifar("dense", "bfloat16"),
        cifar("rank 16", "bfloat16", frozenset({"compiled", "peft"})),
        cifar("dense", "float16", frozenset({"compiled", "bare"})),
        cifar("dense", "tf32", frozenset({"compiled", "bare"})),
        Job("sd15", "dense", "bfloat16", 1, queries=8, draws=4, batch=16, rivals=frozenset({"compiled", "bare"})),
        Job("sd15", "rank 16", "bfloat16", 1, queries=8, draws=4, batch=16, rivals=frozenset({"compiled", "peft"})),
        Job("rgb32", "dense", "bfloat16", models=2, queries=64, draws=16, batch=512),
    ]
    return [partial(job_case, job, quick, MODE) for job in jobs]


TESTS = ("tests/test_rivals.py", "tests/test_engine*.py", "tests/test_deltas_prefetch.py", "tests/test_attention.py")
BENCHMARK = Benchmark("gpu_ladder", _cases, TESTS, device="cuda", repetitions=3)
