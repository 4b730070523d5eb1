"""Which plan runs which rows: predicted from a short calibration on the device itself, and said why."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from guda_fast.diffusion.schedule import FloatArray
from guda_fast.errors import BatchedUnavailableError
from guda_fast.forward.batched_plan import BatchedPlan
from guda_fast.forward.batches import Advance
from guda_fast.forward.noised import NoisedQueries
from guda_fast.forward.rows import Rows
from guda_fast.forward.swap import SwapPlan

PLANS = ("auto", "swap", "batched")

# Where writing the models takes less than this share of the time, batching them cannot gain more.
_NEGLIGIBLE = 0.02
# Making the batched plan reads every delta and rehearses the model: not before so much work, in seconds, might gain.
_WORTH_TRYING = 2.0
_LONG = 0.2  # s; what takes longer is not timed again


class Plan(Protocol):
    """What runs rows: see `SwapPlan.run`."""

    name: str

    def run(self, queries: NoisedQueries, rows: Rows, advance: Advance) -> FloatArray: ...


@dataclass(frozen=True)
class Choice:
    """What was chosen for rows of one shape, and why.

    plan: its name. models: how many have rows. rows: of the model that has most.
    seconds: predicted for each plan that could run. reason: a sentence. final: it stays so, however much work comes.
    """

    plan: str
    models: int
    rows: int
    seconds: dict[str, float]
    reason: str
    final: bool = True

    def __str__(self) -> str:
        return f"{self.plan} for {self.models} models with up to {self.rows} rows each: {self.reason}"


class Planner:
    """Chooses between the swap plan and the batched plan.

    Times are measured at powers of two of rows and models, when they are first asked for, and kept.

    swap: the plan that always runs. make_batched: makes the other one, which takes the time of reading every
    delta, or raises BatchedUnavailableError with the reason. wanted: "auto", or the plan that must run.
    """

    def __init__(self, swap: SwapPlan, make_batched: Callable[[], BatchedPlan], wanted: str = "auto") -> None:
        self.swap = swap
        self.wanted = wanted
        self.choices: dict[tuple[int, int], Choice] = {}
        self._make_batched = make_batched
        self._batched: BatchedPlan | BatchedUnavailableError | None = None
        self._undecided = 0.0
        self._swap_seconds: float | None = None
        self._forwards: dict[int, float] = {}
        self._batched_forwards: dict[tuple[int, int], float] = {}

    def plan(self, rows: Rows) -> Plan:
        """The plan for these rows.

        Raises BatchedUnavailableError where the batched plan is wanted and cannot run.
        """
        if self.wanted == "swap" or len(rows) == 0:
            return self.swap
        if self.wanted == "batched":
            return self.batched()
        return self.swap if self.choose(rows).plan == "swap" else self.batched()

    def choose(self, rows: Rows) -> Choice:
        """The choice for rows of this number of models, and of rows for the model with most."""
        counts = rows.model.unique(return_counts=True)[1]
        return self.choose_for(len(counts), int(counts.max()))

    def choose_for(self, models: int, rows: int, *, now: bool = False) -> Choice:
        """The choice for so many models of so many rows each, both rounded up to a power of two.

        now: measure the batched plan even if there was too little work so far to make it for.
        """
        key = min(_power_of_two(models), len(self.swap.bank) + 1), _power_of_two(rows)
        if key not in self.choices or (now and not self.choices[key].final):
            self.choices[key] = self._choice(*key, now=now)
        choice = self.choices[key]
        if not choice.final:
            self._undecided += choice.seconds["swap"]
            if self._undecided >= _WORTH_TRYING:
                self.choices[key] = choice = self._choice(*key, now=True)
        return choice

    def batched(self) -> BatchedPlan:
        """The batched plan, made at the first call.

        Raises BatchedUnavailableError with the reason where there is none.
        """
        if self._batched is None:
            try:
                self._batched = self._make_batched()
            except BatchedUnavailableError as error:
                self._batched = error
        if isinstance(self._batched, BatchedUnavailableError):
            raise self._batched
        return self._batched

    def swap_seconds(self, models: int, rows: int) -> float:
        """Predicted time of the swap plan."""
        return models * (self._seconds_a_swap() + self._seconds_of_forwards(rows))

    def batched_seconds(self, models: int, rows: int) -> float:
        """Predicted time of the batched plan."""
        sizes = list(self.swap.batches.sizes(models * rows))
        return sum(self._seconds_batched(size, min(models, -(-size // rows))) for size in sizes)

    def _choice(self, models: int, rows: int, *, now: bool) -> Choice:
        seconds = {"swap": self.swap_seconds(models, rows)}
        share = models * self._seconds_a_swap() / seconds["swap"]
        writing = f"writing the models takes {share:.1%} of the swap plan's time"
        if models == 1:
            return Choice("swap", models, rows, seconds, "there is one model")
        # One forward of each model's rows fills its batches: the batched plan does the same work in more steps.
        if share < _NEGLIGIBLE and rows >= self.swap.batches.size:
            return Choice("swap", models, rows, seconds, f"{writing}, and batches are full")
        if self._batched is None and not now:
            reason = "there was too little work so far to make the batched plan for"
            return Choice("swap", models, rows, seconds, reason, final=False)
        try:
            self.batched()
        except BatchedUnavailableError as error:
            return Choice("swap", models, rows, seconds, f"the batched plan is unavailable: {error}")
        seconds["batched"] = self.batched_seconds(models, rows)
        better = min(seconds, key=lambda name: seconds[name])
        times = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
        return Choice(better, models, rows, seconds, f"measured on this device: {times}")

    def _seconds_a_swap(self) -> float:
        if self._swap_seconds is None:
            bank = self.swap.bank
            groups = range(min(3, len(bank)))
            self._swap_seconds = statistics.median(self._seconds(lambda k=k: bank.apply(k)) for k in groups)  # type: ignore[misc]
            bank.restore()
        return self._swap_seconds

    def _seconds_of_forwards(self, rows: int) -> float:
        return sum(self._seconds_a_forward(size) for size in self.swap.batches.sizes(rows))

    def _seconds_a_forward(self, size: int) -> float:
        if size not in self._forwards:
            self._forwards[size] = self._repeated(lambda: self.swap.try_forward(size))
        return self._forwards[size]

    def _seconds_batched(self, size: int, models: int) -> float:
        key = size, min(_power_of_two(models), size, len(self.swap.bank) + 1)
        if key not in self._batched_forwards:
            batched = self.batched()
            self._batched_forwards[key] = self._repeated(lambda: batched.try_forward(*key))
        return self._batched_forwards[key]

    def _repeated(self, call: Callable[[], object]) -> float:
        first = min(self._seconds(call), self._seconds(call))
        return first if first > _LONG else statistics.median([first, *(self._seconds(call) for _ in range(2))])

    def _seconds(self, call: Callable[[], object]) -> float:
        """Wall time of one call, with everything that it starts on the device."""
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
