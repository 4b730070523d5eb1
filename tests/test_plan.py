"""The planner: what it measures, when, and what it chooses and says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

import guda_fast as gf
from guda_fast.errors import BatchedUnavailableError
from guda_fast.forward import Engine, Rows
from guda_fast.forward.batches import Batches
from guda_fast.forward.plan import Planner
from tiny import perturbed, tiny_unet


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
        self.bank = Bank(clock, groups, swap)
        self.clock, self.overhead, self.a_row = clock, overhead, a_row
        self.tried: list[int] = []

    def try_forward(self, size: int) -> None:
        self.tried.append(size)
        self.clock.takes(self.overhead + size * self.a_row)


class Bank:
    def __init__(self, clock: Clock, groups: int, swap: float) -> None:
        self.groups, self.clock, self.swap = groups, clock, swap

    def __len__(self) -> int:
        return self.groups

    def apply(self, group: int) -> None:
        self.clock.takes(self.swap)

    def restore(self) -> None:
        pass


class Batched:
    """A batched plan that takes a time for each model in a forward, and one for each row."""

    def __init__(self, clock: Clock, overhead: float, a_model: float, a_row: float) -> None:
        self.clock, self.overhead, self.a_model, self.a_row = clock, overhead, a_model, a_row

    def try_forward(self, size: int, models: int) -> None:
        self.clock.takes(self.overhead + models * self.a_model + size * self.a_row)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr("guda_fast.forward.plan.time", fake)
    return fake


def planner(clock: Clock, *, swap: float = 1e-3, groups: int = 64, make: Any = None) -> Planner:
    batched = Batched(clock, overhead=4e-3, a_model=2e-3, a_row=1e-3)
    make = make or (lambda: batched)
    return Planner(Swap(clock, groups, swap, overhead=4e-3, a_row=1e-3), make)  # type: ignore[arg-type]


def test_it_chooses_what_is_faster_on_either_side_of_the_crossover(clock: Clock) -> None:
    """For M models of r rows: swap M (1 + 4 + r) ms; batched, in F forwards of 64 rows, 4 F + 2 per model + M r."""
    own = planner(clock)
    for models in (2, 4, 16, 64):
        for rows in (1, 2, 8, 32, 128):
            choice = own.choose_for(models, rows, now=True)
            full, rest = divmod(rows, 64)
            swap = models * (1 + 4 * (full + bool(rest)) + rows)
            assert choice.seconds["swap"] == pytest.approx(swap * 1e-3)
            if "batched" in choice.seconds:
                assert choice.plan == min(choice.seconds, key=choice.seconds.__getitem__)
    assert own.choose_for(64, 1).plan == "batched"
    assert own.choose_for(64, 1).seconds["batched"] == pytest.approx(64e-3 + 64 * 2e-3 + 4e-3)
    assert own.choose_for(2, 128).plan == "swap"
    assert "batched" in str(own.choose_for(64, 1)) and "swap 0.384 s" in str(own.choose_for(64, 1))


def test_full_batches_with_quick_swaps_are_not_worth_a_trial(clock: Clock) -> None:
    def refuse() -> Any:
        raise AssertionError("the batched plan must not be made")

    choice = planner(clock, swap=1e-4, make=refuse).choose_for(10, 512, now=True)
    assert choice.plan == "swap" and "takes 0.0% of the swap plan's time, and batches are full" in choice.reason
    assert "there is one model" in planner(clock, make=refuse).choose_for(1, 4, now=True).reason


def test_the_batched_plan_is_made_only_when_there_is_work_for_it(clock: Clock) -> None:
    made = []

    def make() -> Any:
        made.append(1)
        return Batched(clock, 4e-3, 0.0, 1e-3)

    own = planner(clock, make=make)
    rows = Rows.product(1, list(range(64)), 1)  # 64 models of one row: 0.384 s by swapping
    plans = [own.plan(rows).__class__.__name__ for _ in range(6)]
    assert plans == ["Swap"] * 5 + ["Batched"]
    assert made == [1]
    assert "too little work so far" in str(own.choose_for(2, 1)) or own.choose_for(2, 1).final


def test_without_a_batched_plan_it_swaps_and_says_why(clock: Clock) -> None:
    def make() -> Any:
        raise BatchedUnavailableError("time_proj.weight belongs to no layer")

    own = planner(clock, make=make)
    choice = own.choose_for(64, 1, now=True)
    assert choice.plan == "swap" and "unavailable: time_proj.weight belongs to no layer" in choice.reason
    own.wanted = "batched"
    with pytest.raises(BatchedUnavailableError, match="time_proj.weight belongs"):
        own.plan(Rows.product(1, [1], 1))


def test_measurements_are_kept(clock: Clock) -> None:
    own = planner(clock)
    own.choose_for(16, 4, now=True)
    spent = clock.now
    own.choose_for(16, 4, now=True)
    own.choose_for(13, 3)  # rounded up to the same powers of two
    assert clock.now == spent


def test_long_forwards_are_timed_twice_and_not_more(clock: Clock) -> None:
    own = planner(clock)
    own.swap.overhead = 1.0  # type: ignore[attr-defined]
    own.swap_seconds(2, 64)
    assert own.swap.tried == [64, 64]  # type: ignore[attr-defined]


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
    expected = engine.choices[0].plan if plan == "auto" else plan
    assert used == [expected]
    assert bool(engine.choices) == (plan == "auto")


def test_a_wanted_plan_must_be_one_of_them() -> None:
    bank = SimpleNamespace()
    with pytest.raises(ValueError, match="plan must be one of 'auto', 'swap', 'batched', got 'bached'"):
        Engine(bank, SimpleNamespace(), (1, 8, 8), plan="bached")  # type: ignore[arg-type]
