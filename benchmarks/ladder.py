"""The engine and its rivals on whole scoring jobs, on two CPU threads: each does everything from queries to scores.

The rungs are those of `benchmarks.rivals`. All are compared with one rival, the compiled tuned code, or the eager one
where nothing is compiled; each has its own row, so that every other ratio follows. What does not depend on the queries
is done before the clock starts: compiling, loading, merging. The reference loop stays in float32 in every case,
as it is in use, and keeps its models, since loading them for so few timesteps would count too much.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import architecture, default_device
from benchmarks.registry import Benchmark, Case, Contender
from benchmarks.rivals import BareForwards, PeftMerged, PeftMixed, ReferenceLoop, StackedModels, Tuned
from benchmarks.workloads import ARCHITECTURES, FORMS, Workload, make_workload
from guda_fast import DeltaBank
from guda_fast.datasets.queries import load_queries
from guda_fast.estimators import Full
from guda_fast.forward import POLICIES, Engine
from guda_fast.forward._routing import Inputs

# "own compiled" is the engine itself, with its resident model compiled.
ALL = frozenset({"reference", "eager", "compiled", "own compiled", "vmap", "peft", "bare"})
SAME_NOISE = ("tuned compiled", "tuned eager", "vmap", "peft mixed", "peft merged")
AGREEMENT = 1e-2  # of float32 scores, which are small differences of large errors
PRECISIONS = {"float32": "fp32", "tf32": "tf32", "bfloat16": "bf16", "float16": "fp16"}
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Job:
    """A workload, how it is run, and which rivals run it.

    architecture, form, models, queries, draws: see make_workload. batch: rows a forward of everyone's.
    precision: a key of DTYPES. rivals: some of ALL; "peft" is for low-rank deltas alone.
    """

    architecture: str
    form: str
    precision: str
    models: int
    queries: int
    draws: int
    batch: int
    rivals: frozenset[str] = ALL

    def __str__(self) -> str:
        sizes = f"N={self.queries} K={self.models} D={self.draws} batch={self.batch}"
        return f"{self.architecture} {self.form}, {sizes}"

    @property
    def forwards(self) -> int:
        """Of one row each."""
        return (self.models + 1) * self.queries * self.draws

    def small(self) -> Job:
        """What takes the same way through the code in a moment, with a last batch that is padded."""
        architecture = "tiny-prompted" if self.architecture == "sd15" else "tiny"
        return replace(self, architecture=architecture, models=2, queries=3, draws=2, batch=4)


class Ours:
    """The engine on a workload: what it sets up beforehand, and what is timed.

    precision: a key of DTYPES. batch: rows a forward; None for the engine's default.
    """

    def __init__(
        self, workload: Workload, precision: str, batch: int | None, device: str, compiled: bool = False
    ) -> None:
        bank = DeltaBank.load(workload.base, {delta.origin: delta for delta in workload.deltas})
        self.engine = Engine(
            bank,
            workload.protocol,
            workload.queries.shape[1:],
            device=device,
            precision=POLICIES[PRECISIONS[precision]],
            batch_size=batch,
            plan="swap",
            compiled=compiled,
        )
        self._queries = load_queries(workload.queries, channels=workload.queries.shape[1])

    def scores(self) -> object:
        return Full().run(self.engine, self._queries, lambda forwards: None).scores

    def forward(self, x_t: Tensor, timestep: Tensor) -> object:
        """One batch through the resident model, as a run calls it."""
        return self.engine.swap.forward(Inputs(x_t, timestep, {}))


def job_case(job: Job, quick: bool, mode: str | None = None) -> Case:
    """Everyone on one job. mode: of Inductor; see Tuned."""
    job = job.small() if quick else job
    workload = make_workload(job.architecture, job.form, models=job.models, queries=job.queries, draws=job.draws)
    first, *others = _contenders(workload, job, quick, mode)
    dtype = DTYPES[job.precision]
    numbers = sum(parameter.numel() for parameter in workload.base.parameters())
    return Case(
        op="score",
        shapes=str(job),
        dtype=job.precision,
        bytes=workload.models * numbers * dtype.itemsize + workload.queries.nbytes,
        input_sets=1,
        rival=first,
        contenders=others,
        flop=job.forwards * ARCHITECTURES[job.architecture].flop_per_forward(),
        check=partial(_check_agreement, [first, *others]) if job.precision == "float32" else None,
    )


def _check_agreement(contenders: Sequence[Contender]) -> None:
    """Raise where rivals that draw the same noise do not give the same scores, before any of them is timed."""
    scores = {rival.backend: torch.as_tensor(rival.call(0)) for rival in contenders if rival.backend in SAME_NOISE}
    for name, found in scores.items():
        expected = next(iter(scores.values()))
        error = float((found - expected).norm() / expected.norm())
        if not error < AGREEMENT:
            raise RuntimeError(
                f"{name} must give the scores of {next(iter(scores))}, got a relative error of {error:.2g}"
            )


def _contenders(workload: Workload, job: Job, quick: bool, mode: str | None) -> Iterator[Contender]:
    """Who runs the job, the rival that the ratios are against first."""
    device, dtype = default_device(), DTYPES[job.precision]
    tf32 = job.precision == "tf32"

    def contender(name: str, run: Callable[[], object]) -> Contender:
        return Contender(name, architecture(), lambda number: run())

    def scorer(name: str, kind: Callable[..., Any], **options: Any) -> Contender:
        rival = kind(workload, batch=job.batch, dtype=dtype, device=device, **options)
        return contender(name, partial(rival.scores, workload.queries))

    if "compiled" in job.rivals:
        # Quick does not wait for the compiler.
        how = {"compiler": "eager"} if quick else {"compiler": "inductor", "mode": mode}
        yield scorer("tuned compiled", Tuned, tf32=tf32, **how)
    if "eager" in job.rivals:
        yield scorer("tuned eager", Tuned, tf32=tf32, compiler=None)
    ours = Ours(workload, job.precision, job.batch, device)
    yield contender("guda_fast swap", ours.scores)
    if "own compiled" in job.rivals and not quick:
        compiled = Ours(workload, job.precision, job.batch, device, compiled=True)
        yield contender("guda_fast swap, compiled", compiled.scores)
    if "bare" in job.rivals:
        batches = workload.models * -(-workload.rows // job.batch)
        shape = (job.batch, *workload.queries.shape[1:])
        bare = BareForwards(ours.forward, shape, batches=batches, dtype=dtype, device=device)
        yield contender("bare forwards", bare.run)
    if "vmap" in job.rivals:
        yield scorer("vmap", StackedModels)
    if "peft" in job.rivals and job.form != "dense":
        if importlib.util.find_spec("peft") is None:
            print(f"{job}: peft is not measured: it is not installed", file=sys.stderr)
        else:
            yield scorer("peft mixed", PeftMixed)
            yield scorer("peft merged", PeftMerged)
    if "reference" in job.rivals:
        name = "reference loop" if job.precision == "float32" else "reference loop, float32"
        yield contender(name, partial(reference_loop(workload, device).scores, workload.queries))


def reference_loop(workload: Workload, device: str) -> ReferenceLoop:
    """The rival on a workload, with its models loaded."""
    with tempfile.TemporaryDirectory() as folder:
        saved = workload.save(Path(folder))
        return ReferenceLoop(saved, workload.protocol, device=device, reload=False)


def _jobs() -> list[Job]:
    return [
        Job(architecture, form, precision, models=2, queries=64, draws=draws, batch=64)
        for architecture, draws in (("digits", 8), ("rgb32", 2))
        for precision in ("float32", "bfloat16")
        for form in FORMS
    ]


def _cases(quick: bool) -> list[Callable[[], Case]]:
    jobs = [job for job in _jobs() if not (quick and job.architecture == "digits")]
    return [partial(job_case, job, quick) for job in jobs]


TESTS = ("tests/test_rivals.py", "tests/test_engine.py", "tests/test_attention*.py", "tests/test_fuse.py")
BENCHMARK = Benchmark("ladder", _cases, TESTS, threads=2, repetitions=5)
