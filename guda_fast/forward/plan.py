"""Which plan runs which rows: predicted from a short calibration on the device itself, and said why."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from guda_fast.diffusion.schedule import FloatArray
from guda_fast.errors import BatchedUnavailableError
from guda_fast.forward.batched_plan import BatchedPlan
from guda_fast.forward.batches import Advance, is_out_of_memory
from guda_fast.forward.noised import NoisedQueries
from guda_fast.forward.rows import BASE, Rows
from guda_fast.forward.swap import SwapPlan

PLANS = ("auto", "swap", "batched")
Counts = NDArray[np.int64]
"""How many rows each model has that has any, in the order of the models."""

# Where writing the models takes less than this share of the time, batching them cannot gain more.
_NEGLIGIBLE = 0.02
# Measuring takes a few forwards and swaps: not before so many forwards were asked for.
_FORWARDS = 32
# Making the batched plan reads every delta and rehearses the model: not before so many seconds of work might gain.
_WORTH_TRYING = 2.0
# Long work finds caches in another state than a few forwards do: only a gain of more than this is believed.
_CLEARLY = 0.95
_MODELS = 4  # are written when the time of writing one is measured
_LONG = 0.2  # s; what takes longer is not timed again


class Plan(Protocol):
    """What runs rows: see `SwapPlan.run`."""

    def run(self, queries: NoisedQueries, rows: Rows, advance: Advance) -> FloatArray: ...


@dataclass(frozen=True)
class Choice:
    """What was chosen for rows, and why.

    plan: its name. models, rows: how many, in all. seconds: predicted for each plan that was looked at.
    reason: a clause.
    """

    plan: str
    models: int
    rows: int
    seconds: dict[str, float]
    reason: str

    def __str__(self) -> str:
        return f"{self.plan} for {self.rows} rows of {self.models} models: {self.reason}"


class Planner:
    """Chooses between the swap plan and the batched plan.

    Both are predicted from the times of a swap and of forwards of each size, which are measured when they are first
    needed, and kept until the size of a batch changes.

    swap: the plan that always runs. make_batched: makes the other one, which takes the time of reading every
    delta, or raises BatchedUnavailableError with the reason. probe: gives a query like those of the run, for measuring.
    wanted: "auto", or the plan that must run, and because of what.
    """

    def __init__(
        self,
        swap: SwapPlan,
        make_batched: Callable[[], BatchedPlan],
        probe: Callable[[], NoisedQueries],
        wanted: str = "auto",
        because: str = "it was asked for",
    ) -> None:
        self.swap = swap
        self.wanted, self.because = wanted, because
        self.choices: dict[tuple[int, int], Choice] = {}
        self._make_batched, self._probe = make_batched, probe
        self._batched: BatchedPlan | BatchedUnavailableError | None = None
        self._asked_forwards = 0
        self._undecided = 0.0
        self._forget()

    def plan(self, rows: Rows) -> Plan:
        """The plan for these rows.

        Raises BatchedUnavailableError where the batched plan is wanted and cannot run.
        """
        return self.swap if self.choose(row_counts(rows)).plan == "swap" else self.batched()

    def choose(self, counts: Counts, *, now: bool = False) -> Choice:
        """The choice for models of so many rows; it is kept by magnitude, to be shown.

        now: measure even if there was too little work so far.
        """
        while True:
            try:
                choice = self._choice(counts, now)
            except (RuntimeError, MemoryError) as error:
                if not self.swap.batches.shrink(error):
                    raise
                self.swap.forward.forget_graphs()
                continue
            self.choices[_power_of_two(choice.models), _power_of_two(choice.rows)] = choice
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
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._batched = BatchedUnavailableError(f"memory ran out while it was made: {error}")
        if isinstance(self._batched, BatchedUnavailableError):
            raise self._batched
        return self._batched

    def swap_seconds(self, counts: Counts) -> float:
        """Predicted time of the swap plan."""
        forwards = sum(
            int(models) * sum(map(self._seconds_a_forward, self.swap.batches.sizes(int(rows))))
            for rows, models in zip(*_distinct(counts), strict=True)
        )
        return len(counts) * self._seconds_a_swap() + forwards

    def batched_seconds(self, counts: Counts) -> float:
        """Predicted time of the batched plan, which fills its batches model by model."""
        size = self.swap.batches.size
        ends = np.cumsum(counts)
        starts = np.arange(0, ends[-1], size)
        stops = np.minimum(starts + size, ends[-1])
        models = 1 + np.searchsorted(ends, stops - 1, side="right") - np.searchsorted(ends, starts, side="right")
        shapes = np.stack([stops - starts, models])
        return sum(
            int(times) * self._seconds_batched(self.swap.batches.padded(int(rows)), int(models))
            for (rows, models), times in zip(*_distinct(shapes, axis=1), strict=True)
        )

    def _choice(self, counts: Counts, now: bool) -> Choice:
        self._forget_other_sizes()
        models, rows = len(counts), int(counts.sum())
        if self.wanted == "batched":
            self.batched()
        if self.wanted != "auto":
            return Choice(self.wanted, models, rows, {}, self.because)
        if models == 1:
            return Choice("swap", models, rows, {}, "there is one model")
        self._asked_forwards += int((-(-counts // self.swap.batches.size)).sum())
        if self._asked_forwards < _FORWARDS and self._swap_seconds is None and not now:
            return Choice("swap", models, rows, {}, "there was too little work so far to measure")
        seconds = {"swap": self.swap_seconds(counts)}
        share = models * self._seconds_a_swap() / seconds["swap"]
        # Then the batched plan does the same work in more steps.
        if share < _NEGLIGIBLE and counts.min() >= self.swap.batches.size:
            reason = f"writing the models takes {share:.1%} of its time, and batches are full"
            return Choice("swap", models, rows, seconds, reason)
        if self._batched is None:
            self._undecided += seconds["swap"]
            if self._undecided < _WORTH_TRYING and not now:
                reason = "there was too little work so far to make the batched plan for"
                return Choice("swap", models, rows, seconds, reason)
        return self._faster(counts, seconds)

    def _faster(self, counts: Counts, seconds: dict[str, float]) -> Choice:
        models, rows = len(counts), int(counts.sum())
        try:
            self.batched()
        except BatchedUnavailableError as error:
            return Choice("swap", models, rows, seconds, f"the batched plan is unavailable: {error}")
        seconds["batched"] = self.batched_seconds(counts)
        better = "batched" if seconds["batched"] < _CLEARLY * seconds["swap"] else "swap"
        times = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
        return Choice(better, models, rows, seconds, f"predicted from measurements here: {times}")

    def _forget_other_sizes(self) -> None:
        if self._size != self.swap.batches.size:
            self._forget()

    def _forget(self) -> None:
        self._size = self.swap.batches.size
        self._swap_seconds: float | None = None
        self._forwards: dict[int, float] = {}
        self._batched_forwards: dict[tuple[int, int], float] = {}

    def _seconds_a_swap(self) -> float:
        """Writing a model, and whatever else a run does for each, beside its forwards."""
        if self._swap_seconds is None:
            models = min(_MODELS, len(self.swap.bank))
            for group in range(models):
                self.swap.bank.survey(group)  # which the first use of a group would do otherwise
            queries = self._probe()
            base, several = (
                self._repeated(partial(self.swap.run, queries, Rows.product(1, chosen, 1), _nothing))
                for chosen in ([BASE], list(range(models + 1)))
            )
            each = (several - base) / models - self._seconds_a_forward(self.swap.batches.padded(1))
            self._swap_seconds = max(0.0, each)
        return self._swap_seconds

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
        """Wall time of one call, with everything that it starts on the current device."""
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def _nothing(_: int) -> None:
    return None


def row_counts(rows: Rows) -> Counts:
    """How many rows each model has that has any, in the order of the models."""
    counts: Counts = rows.model.unique(return_counts=True)[1].numpy()
    return counts


def _distinct(values: NDArray[np.int64], axis: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different values, or columns as rows, and how often each comes."""
    distinct, times = np.unique(values, axis=axis, return_counts=True)
    return distinct.T, times


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
