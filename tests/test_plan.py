"""The planner: what it measures, when, and what it chooses and says."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

import guda_fast as gf
from guda_fast.errors import BatchedUnavailableError
from guda_fast.forward import POLICIES, Engine, Rows
from guda_fast.forward.batches import Batches
from guda_fast.forward.plan import Planner
from tiny import perturbed, tiny_unet

DRAWS = 3


class Clock:
    """Stands in for wall time: each piece of work says what it takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def takes(self, seconds: float) -> None:
        self.now += seconds


class Swap:
    """A swap plan whose swap and forward take given times."""

    def __init__(self, clock: Clock, groups: int, swap: float, overhead: float, a_row: float) -> None:
        self.batches = Batches(64)
        self.bank = range(groups)
        self.clock, self.swap, self.overhead, self.a_row = clock, swap, overhead, a_row
        self.tried: list[tuple[int, ...]] = []

    def run(self, queries: int, rows: Rows, advance: object) -> None:
        check_rows(queries, rows)
        models, counts = rows.model.unique(return_counts=True)
        self.tried.append(tuple(counts.tolist()))
        for model, count in zip(models.tolist(), counts.tolist(), strict=True):
            self.clock.takes((self.swap if model else 0) + self.overhead + self.batches.padded(count) * self.a_row)


class Batched:
    """A batched plan that takes a time for each model in a forward, and one for each row."""

    def __init__(self, clock: Clock, overhead: float, a_model: float, a_row: float) -> None:
        self.clock, self.overhead, self.a_model, self.a_row = clock, overhead, a_model, a_row
        self.tried: list[list[int]] = []

    def run(self, queries: int, rows: Rows, advance: object) -> None:
        check_rows(queries, rows)
        models = rows.model.unique().tolist()
        self.tried.append(models)
        self.clock.takes(self.overhead + len(models) * self.a_model + len(rows) * self.a_row)


def check_rows(queries: int, rows: Rows) -> None:
    """Each model has draws of one query, then of the next, and they are there."""
    rows.check(queries, 1 << 20, DRAWS)
    for _, index in rows.by_model():
        assert (rows.query * DRAWS + rows.draw)[index].tolist() == list(range(len(index)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr("guda_fast.forward.trials.time", fake)
    return fake


def planner(clock: Clock, *, swap: float = 1e-3, groups: int = 64, make: Any = None) -> Planner:
    batched = Batched(clock, overhead=4e-3, a_model=2e-3, a_row=1e-3)
    make = make or (lambda: batched)
    plan = Swap(clock, groups, swap, overhead=4e-3, a_row=1e-3)
    return Planner(plan, make, lambda queries: queries, DRAWS)  # type: ignore[arg-type, return-value]


def counts(models: int, rows: int) -> np.ndarray:
    return np.full(models, rows)


# Milliseconds of swapping and of batching, by hand from the figures in ``planner``: a swap takes 1, a forward 4 and 1 a
# row; batched, 4, 2 for each of its models, 1 a row. 33 rows are padded to 40.
@pytest.mark.parametrize(
    ("models", "rows", "swap", "batched"),
    [
        (64, 1, 64 * (1 + 4 + 1), 4 + 64 * 2 + 64),
        (16, 4, 16 * (1 + 4 + 4), 4 + 16 * 2 + 64),
        (2, 48, 2 * (1 + 4 + 48), (4 + 2 * 2 + 64) + (4 + 2 + 32)),
        (3, 33, 3 * (1 + 4 + 40), (4 + 2 * 2 + 64) + (4 + 2 * 2 + 40)),
    ],
)
def test_it_predicts_both_plans_and_takes_the_faster(
    clock: Clock, models: int, rows: int, swap: float, batched: float
) -> None:
    choice = planner(clock).choose(counts(models, rows), now=True)
    assert choice.seconds == {"swap": pytest.approx(swap * 1e-3), "batched": pytest.approx(batched * 1e-3)}
    assert choice.plan == ("swap" if swap < batched else "batched")
    assert (choice.models, choice.rows) == (models, models * rows)
    assert str(choice).startswith(f"{choice.plan} for {models * rows} rows of {models} models: predicted from")


def test_ragged_work_is_not_taken_for_full_batches(clock: Clock) -> None:
    """The base with 256 rows, and 63 models with one: as racing asks."""
    choice = planner(clock).choose(np.array([256, *[1] * 63]), now=True)
    assert choice.seconds["swap"] == pytest.approx(64 * 1e-3 + 4 * 68e-3 + 63 * 5e-3)
    assert choice.seconds["batched"] == pytest.approx(4 * 70e-3 + (4 + 64 * 2 + 64) * 1e-3)
    assert choice.plan == "batched"


def test_full_batches_with_quick_swaps_are_not_worth_a_trial(clock: Clock) -> None:
    def refuse() -> Any:
        raise AssertionError("the batched plan must not be made")

    choice = planner(clock, swap=1e-4, make=refuse).choose(counts(10, 512), now=True)
    assert choice.plan == "swap" and "takes 0.0% of its time, and batches are full" in choice.reason
    before = clock.now
    assert planner(clock, make=refuse).choose(counts(1, 4), now=True).reason == "there is one model"
    assert clock.now == before


def test_nothing_is_measured_for_little_work(clock: Clock) -> None:
    made = []

    def make() -> Any:
        made.append(1)
        return Batched(clock, 4e-3, 0.0, 1e-3)

    own = planner(clock, make=make)
    small = Rows.product(1, [0, 1, 2, 3], 1)
    assert [type(own.plan(small)).__name__ for _ in range(7)] == ["Swap"] * 7
    assert clock.now == 0 and "too little work so far to measure" in own.choose(counts(2, 1)).reason
    rows = Rows.product(1, list(range(64)), 1)  # 64 models of one row: 0.384 s by swapping
    assert [type(own.plan(rows)).__name__ for _ in range(6)] == ["Swap"] * 5 + ["Batched"]
    assert made == [1] and "predicted from measurements" in own.choose(counts(64, 1)).reason


def test_without_a_batched_plan_it_swaps_and_says_why(clock: Clock) -> None:
    def make() -> Any:
        raise BatchedUnavailableError("time_proj.weight belongs to no layer")

    own = planner(clock, make=make)
    choice = own.choose(counts(64, 1), now=True)
    assert choice.plan == "swap" and "unavailable: time_proj.weight belongs to no layer" in choice.reason
    own.wanted = "batched"
    with pytest.raises(BatchedUnavailableError, match="time_proj.weight belongs"):
        own.plan(Rows.product(1, [1], 1))


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory"), MemoryError(), RuntimeError("a bug")])
def test_memory_that_runs_out_while_it_is_made_is_a_reason(clock: Clock, error: Exception) -> None:
    def make() -> Any:
        raise error

    own = planner(clock, make=make)
    if "bug" in str(error):
        with pytest.raises(RuntimeError, match="a bug"):
            own.choose(counts(64, 1), now=True)
    else:
        assert "memory ran out" in own.choose(counts(64, 1), now=True).reason


def test_measurements_are_kept_while_batches_stay_as_they_are(clock: Clock) -> None:
    own = planner(clock)
    own.choose(counts(16, 4), now=True)
    spent = clock.now
    own.choose(counts(16, 4), now=True)
    assert clock.now == spent
    own.swap.batches.size = 32
    own.choose(counts(16, 4), now=True)
    assert clock.now > spent


def test_long_forwards_are_timed_once_after_a_first_try(clock: Clock) -> None:
    own = planner(clock)
    own.swap.overhead = 1.0  # type: ignore[attr-defined]
    assert own.seconds("swap", counts(2, 64)) == pytest.approx(2 * (1e-3 + 1 + 64e-3))
    # Writing takes the base and four models, less forwards of one row; then a forward of one batch.
    assert own.swap.tried == [*2 * [(1,)], *2 * [(1, 1, 1, 1, 1)], *2 * [(64,)]]  # type: ignore[attr-defined]


class Unsteady(Batched):
    """Is ten milliseconds slower in its first calls."""

    slow = 4

    def run(self, queries: int, rows: Rows, advance: object) -> None:
        super().run(queries, rows, advance)
        self.clock.takes(0.010 if len(self.tried) <= self.slow else 0.0)


# Two models of 32 rows: 2 * (1 + 4 + 32) ms by swapping, 4 + 2 * 1 + 64 ms in a batch when it is steady.
def test_plans_that_come_out_close_are_measured_again(clock: Clock) -> None:
    batched = Unsteady(clock, overhead=4e-3, a_model=1e-3, a_row=1e-3)
    choice = planner(clock, make=lambda: batched).choose(counts(2, 32), now=True)
    assert choice.seconds == {"swap": pytest.approx(74e-3), "batched": pytest.approx(70e-3)}
    assert choice.plan == "batched"
    assert len(batched.tried) == 1 + 12

    quick = Unsteady(clock, overhead=4e-3, a_model=0.0, a_row=0.5e-3)
    choice = planner(clock, make=lambda: quick).choose(counts(2, 32), now=True)
    assert choice.seconds["batched"] == pytest.approx(46e-3)  # as the first calls had it
    assert choice.plan == "batched" and len(quick.tried) == 1 + 3


def test_measuring_again_takes_a_small_share_of_the_work(clock: Clock) -> None:
    batched = Unsteady(clock, overhead=4e-3, a_model=1e-3, a_row=1e-3)
    own = planner(clock, make=lambda: batched)
    shown = own.choose(counts(64, 32))  # 64 * 37 ms, of which 3 % is less than the pieces take in one round
    assert shown.plan == "swap" and len(batched.tried) == 1 + 3 + 1
    while own.choose(counts(64, 32)).plan == "swap":
        assert len(batched.tried) <= 12
    for _ in range(100):
        own.choose(counts(64, 32))
    assert len(batched.tried) == 1 + 12  # and then no more


def test_memory_that_runs_out_in_a_close_call(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    own = planner(clock, make=lambda: Batched(clock, overhead=4e-3, a_model=1e-3, a_row=1e-3))
    run = own.swap.run

    def large(queries: int, rows: Rows, advance: object) -> None:
        run(queries, rows, advance)  # type: ignore[arg-type]
        if len(rows) > 8:
            own.swap.batches.size = 32

    monkeypatch.setattr(own.swap, "run", large)
    choice = own.choose(counts(4, 16), now=True)  # 4 * (1 + 4 + 16) ms; two batches of 4 + 2 * 1 + 32
    assert choice.seconds == {"swap": pytest.approx(84e-3), "batched": pytest.approx(76e-3)}


@pytest.mark.parametrize("last", [True, False])
def test_memory_that_runs_out_by_batching_leaves_the_swap_plan_as_it_is(clock: Clock, last: bool) -> None:
    class Large(Batched):
        def run(self, queries: int, rows: Rows, advance: object) -> None:
            super().run(queries, rows, advance)
            if last:
                raise MemoryError
            own.swap.batches.size = 32

    own = planner(clock, make=lambda: Large(clock, 4e-3, 1e-3, 1e-3))
    choice = own.choose(counts(4, 16), now=True)
    assert choice.plan == "swap" and "memory ran out when it was tried with batches of 64" in choice.reason
    assert own.swap.batches.size == 64
    assert own.choose(counts(4, 16), now=True).reason == choice.reason


def test_why_there_is_no_batched_plan_keeps_nothing_alive(clock: Clock) -> None:
    class Large:
        pass

    alive = []

    def make() -> Any:
        held = Large()
        alive.append(weakref.ref(held))
        raise BatchedUnavailableError("it is too large")

    own = planner(clock, make=make)
    gc.disable()
    try:
        for _ in range(2):
            assert "it is too large" in own.choose(counts(64, 1), now=True).reason
        assert [held() for held in alive] == [None]
    finally:
        gc.enable()


def test_a_batch_is_tried_with_other_models_each_time(clock: Clock) -> None:
    batched = Batched(clock, 4e-3, 1e-3, 1e-3)
    planner(clock, groups=9, make=lambda: batched).seconds("batched", counts(4, 16))
    assert batched.tried == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 8, 9], [2, 3, 4, 5]]


def test_measuring_leaves_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_unet()
    bank = gf.DeltaBank.load(base, {name: perturbed(base, seed) for seed, name in enumerate("ab", 1)})
    engine = Engine(bank, gf.Protocol.from_scheduler(DDPMScheduler(), stride=500), (1, 8, 8), batch_size=8)
    forward, calls = engine.swap.forward.__class__.__call__, list[str | None]()

    def interrupted(self: object, *args: Any) -> Any:
        calls.append(bank.applied_group)
        if bank.applied_group == "b":
            raise KeyboardInterrupt
        return forward(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.swap.forward.__class__, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.choose(2, 4)
    assert {None, "a", "b"} <= set(calls)
    assert bank.applied_group is None


@pytest.mark.parametrize("plan", ["auto", "swap", "batched"])
def test_an_engine_follows_the_plan_that_was_asked_for(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base: nn.Module = perturbed(tiny_unet(), 0.05)
    bank = gf.DeltaBank.load(base, {"a": perturbed(base, seed=2), "b": perturbed(base, seed=3)})
    protocol = gf.Protocol.from_scheduler(DDPMScheduler(num_train_timesteps=100), start=5, stride=30)
    engine = Engine(bank, protocol, (1, 8, 8), batch_size=8, plan=plan)
    used = []
    for part, name in ((engine.swap, "swap"), (engine.planner.batched(), "batched")):
        run = part.run
        monkeypatch.setattr(part, "run", lambda *a, run=run, name=name: used.append(name) or run(*a))
    queries = engine.queries(torch.zeros(2, 1, 8, 8), [1, 2])
    engine.errors(queries, Rows.product(2, [0, 1, 2], 3))
    assert used == [engine.choices[0].plan] and engine.choices[0].plan == ("swap" if plan == "auto" else plan)
    assert engine.choices[0].reason == (
        "there was too little work so far to measure" if plan == "auto" else "it was asked for"
    )


@pytest.mark.parametrize(
    ("precision", "wanted"), [("fp64", "auto"), ("fp32", "auto"), ("tf32", "swap"), ("fp16", "swap"), ("bf16", "swap")]
)
def test_scores_that_are_rounded_do_not_hang_on_a_stopwatch(precision: str, wanted: str) -> None:
    base = tiny_unet()
    bank = gf.DeltaBank.load(base, {"a": perturbed(base, 1)})
    protocol = gf.Protocol.from_scheduler(DDPMScheduler(), stride=500)
    engine = Engine(bank, protocol, (1, 8, 8), batch_size=8, precision=POLICIES[precision])
    assert engine.planner.wanted == wanted


def test_a_wanted_plan_must_be_one_of_them() -> None:
    bank = SimpleNamespace()
    with pytest.raises(ValueError, match="plan must be one of 'auto', 'swap', 'batched', got 'bached'"):
        Engine(bank, SimpleNamespace(), (1, 8, 8), plan="bached")  # type: ignore[arg-type]
