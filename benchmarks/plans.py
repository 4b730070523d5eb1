"""The swap plan, the batched plan and the planner's choice, over rows a model and numbers of models.

Each call takes all rows from queries to errors. The planner has measured and decided before the clock starts; its row
names the plan that it chose, and says by its ratio what following it gains over always swapping. It runs that plan in
an engine of its own: its time and that of the plan's own row are two measurements of the same code. Freed memory is
kept, as the commands keep it: otherwise a forward's time depends on what ran before it in the process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.contenders import architecture
from benchmarks.registry import Benchmark, Case, Contender
from benchmarks.workloads import ARCHITECTURES, Workload, make_workload
from guda_fast import DeltaBank, keep_freed_memory
from guda_fast.forward import Engine, Rows

DRAWS = 8


def plans_case(network: str, form: str, models: int, rows: int, quick: bool) -> Case:
    """All plans on ``rows`` rows of each of K counterfactuals; no base, as when its errors are known."""
    keep_freed_memory()
    queries, draws = -(-rows // DRAWS), min(rows, DRAWS)
    workload = make_workload("tiny" if quick else network, form, models=models, queries=queries, draws=draws)
    contenders = [_contender(workload, plan, queries * draws) for plan in ("swap", "batched", "auto")]
    numbers = sum(parameter.numel() for parameter in workload.base.parameters())
    flop = ARCHITECTURES[workload.architecture].flop_per_forward()
    return Case(
        op="plan",
        shapes=f"{network} {form}, K={models} rows={queries * draws}",
        dtype="float32",
        bytes=4 * numbers * models,
        input_sets=1,
        rival=contenders[0],
        contenders=contenders[1:],
        flop=flop * models * queries * draws,
    )


def _contender(workload: Workload, plan: str, rows: int) -> Contender:
    bank = DeltaBank.load(workload.base, {delta.origin: delta for delta in workload.deltas})
    engine = Engine(bank, workload.protocol, tuple(workload.queries.shape[1:]), plan=plan)
    queries = engine.queries(workload.queries, range(len(workload.queries)))
    work = Rows.product(len(workload.queries), list(range(1, len(bank) + 1)), workload.protocol.draws)
    bank.survey()
    name = plan
    if plan == "auto":
        choice = engine.choose(len(bank), rows)
        print(choice, flush=True)
        name = f"auto: {choice.plan}"

    def run(number: int) -> torch.Tensor:
        return torch.from_numpy(engine.errors(queries, work))

    return Contender(name, architecture(), run)


def _cases(quick: bool) -> list[Callable[[], Case]]:
    grid = [(k, r) for k in (2, 8, 64) for r in (1, 4, 16, 64, 256)]
    large = [(k, r) for k in (2, 16) for r in (1, 4, 16, 64)]
    jobs = [("digits", form, k, r) for form in ("dense", "rank 4") for k, r in (grid[:2] if quick else grid)]
    jobs += [] if quick else [("rgb32", form, k, r) for form in ("dense", "rank 4") for k, r in large]
    return [partial(plans_case, *job, quick) for job in jobs]


BENCHMARK = Benchmark("plans", _cases, ("tests/test_plan.py", "tests/test_batched*.py"), threads=2, repetitions=7)
