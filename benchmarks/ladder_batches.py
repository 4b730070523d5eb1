"""The engine at its default batch against tuned, compiled code at several, on the smallest network.

`ladder` gives everyone one size of batch. Where forwards are short that size decides much, and an expert would try a
few: each of theirs has a row here, at the length of a protocol, interleaved with ours. Ratios are against the tuned
code at batches of 64. All share the process, and so whether freed memory is given back, as in the first case, or kept,
as the commands keep it and the other cases do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.contenders import architecture, default_device
from benchmarks.ladder import DTYPES, TESTS, Job, Ours
from benchmarks.registry import Benchmark, Case, Contender
from benchmarks.rivals import Tuned
from benchmarks.workloads import ARCHITECTURES, FORMS, Workload, make_workload
from guda_fast import keep_freed_memory

BATCHES = (64, 128, 192, 256)


def _case(job: Job, kept: bool, quick: bool) -> Case:
    if kept:
        keep_freed_memory()
    job = job.small() if quick else job
    workload = make_workload(job.architecture, job.form, models=job.models, queries=job.queries, draws=job.draws)
    contenders = list(_contenders(workload, job, quick))
    numbers = sum(parameter.numel() for parameter in workload.base.parameters())
    dtype = DTYPES[job.precision]
    return Case(
        op="score",
        shapes=f"{job.architecture} {job.form}, N={job.queries} K={job.models} D={job.draws}"
        + ("" if kept else ", memory given back"),
        dtype=job.precision,
        bytes=workload.models * numbers * dtype.itemsize + workload.queries.nbytes,
        input_sets=1,
        rival=contenders[0],
        contenders=contenders[1:],
        flop=job.forwards * ARCHITECTURES[job.architecture].flop_per_forward(),
    )


def _contenders(workload: Workload, job: Job, quick: bool) -> Iterator[Contender]:
    device, dtype = default_device(), DTYPES[job.precision]
    for batch in BATCHES[:2] if quick else BATCHES:
        tuned = Tuned(workload, batch=batch, dtype=dtype, device=device, compiler="eager" if quick else "inductor")
        run = partial(tuned.scores, workload.queries)
        yield Contender(f"tuned compiled, batch {batch}", architecture(), lambda number, run=run: run())
    for compiled in (False,) if quick else (False, True):
        ours = Ours(workload, job.precision, None, device, compiled=compiled)
        name = f"guda_fast swap{', compiled' if compiled else ''}, batch {ours.engine.batches.size}"
        yield Contender(name, architecture(), lambda number, ours=ours: ours.scores())


def _cases(quick: bool) -> list[Callable[[], Case]]:
    kinds = [("dense", "float32"), *((form, "float32") for form in FORMS), ("dense", "bfloat16")]
    jobs = [Job("digits", form, precision, 2, queries=64, draws=99, batch=BATCHES[0]) for form, precision in kinds]
    cases = [partial(_case, job, number > 0, quick) for number, job in enumerate(jobs)]
    return cases[-1:] if quick else cases


BENCHMARK = Benchmark("ladder_batches", _cases, TESTS, threads=2, repetitions=5)
