"""Which plan runs which rows: predicted from a short calibration on the device itself, and said why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guda_fast.errors import BatchedUnavailableError
from guda_fast.forward.batched_plan import BatchedPlan
from guda_fast.forward.batches import is_out_of_memory
from guda_fast.forward.noised import NoisedQueries
from guda_fast.forward.rows import Rows
from guda_fast.forward.swap import SwapPlan
from guda_fast.forward.trials import Piece, Plan, Trials

PLANS = ("auto", "swap", "batched")
Counts = NDArray[np.int64]
"""How many rows each model has that has any, in the order of the models."""

# Where writing the models takes less than this share of the time, batching them cannot gain more.
_NEGLIGIBLE = 0.02
# Measuring takes up to 28 forwards, most of them of one row, and 16 swaps: not before so many forwards were asked for.
_WORTH_MEASURING = 32
# Making the batched plan reads every delta and rehearses the model: not before so many seconds of work might gain.
_WORTH_TRYING = 2.0
# Plans that are predicted to differ by less are measured again, for no more than this share of the work's own time.
_CLOSE, _REPEATING = 0.15, 0.03
# The swap plan takes less memory: it is left only for a gain of more than this.
_WORTH_LEAVING = 0.02
# Writing a model, and whatever else a run does for each, beside its forwards.
_WRITE = Piece("swap", rows=0)


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


class BatchedOnce:
    """Gives the batched plan, made at the first call, or raises BatchedUnavailableError with the reason.

    tried: whether there was a call.
    """

    def __init__(self, make: Callable[[], BatchedPlan]) -> None:
        self._make = make
        # Not the error, whose frames would keep all that was there when it was raised.
        self._made: BatchedPlan | str | None = None

    @property
    def tried(self) -> bool:
        return self._made is not None

    def __call__(self) -> BatchedPlan:
        if self._made is None:
            try:
                self._made = self._make()
            except BatchedUnavailableError as error:
                self._made = str(error)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._made = f"memory ran out while it was made: {error}"
        if isinstance(self._made, str):
            raise BatchedUnavailableError(self._made)
        return self._made

    def give_up(self, reason: str) -> None:
        """Have no batched plan from here on."""
        self._made = reason


class Planner:
    """Chooses between the swap plan and the batched plan.

    Both are predicted from the times of a swap and of forwards of each size, which are measured when they are first
    needed, and kept until the size of a batch changes. Where the two come out close, they are measured more often.

    swap: the plan that always runs. make_batched: makes the other one, which takes the time of reading every
    delta, or raises BatchedUnavailableError with the reason. probe: gives so many queries like those of the run, for
    measuring. draws: of its protocol. wanted: "auto", or the plan that must run, and because of what.
    """

    def __init__(
        self,
        swap: SwapPlan,
        make_batched: Callable[[], BatchedPlan],
        probe: Callable[[int], NoisedQueries],
        draws: int,
        wanted: str = "auto",
        because: str = "it was asked for",
    ) -> None:
        self.swap = swap
        self.wanted, self.because = wanted, because
        self.choices: dict[tuple[int, int], Choice] = {}
        self.batched = BatchedOnce(make_batched)
        self._asked_forwards = 0
        self._asked_seconds = self._repeated_seconds = 0.0
        self._trials = Trials(swap, self.batched, probe, swap.batches, len(swap.bank), draws)
        self._size = swap.batches.size

    def plan(self, rows: Rows) -> Plan:
        """The plan for these rows.

        Raises BatchedUnavailableError where the batched plan is wanted and cannot run.
        """
        return self.swap if self.choose(row_counts(rows)).plan == "swap" else self.batched()

    def choose(self, counts: Counts, *, now: bool = False) -> Choice:
        """The choice for models of so many rows; it is kept by magnitude, to be shown.

        now: measure even if there was too little work so far.
        """
        choice = self._choice(counts, now)
        while self._size != self.swap.batches.size:  # Memory ran out in a trial.
            choice = self._choice(counts, now)
        self.choices[_power_of_two(choice.models), _power_of_two(choice.rows)] = choice
        return choice

    def seconds(self, plan: str, counts: Counts) -> float:
        """Predicted time of a plan."""
        pieces = self._swap_pieces(counts) if plan == "swap" else self._batched_pieces(counts)
        return sum(times * self._trials.seconds(piece) for piece, times in pieces.items())

    def _swap_pieces(self, counts: Counts) -> Counter[Piece]:
        """The pieces of the swap plan's work, and how often each comes."""
        pieces = Counter({_WRITE: len(counts)})
        for rows, models in zip(*_distinct(counts), strict=True):
            for size in self.swap.batches.sizes(int(rows)):
                pieces[Piece("swap", size)] += int(models)
        return pieces

    def _batched_pieces(self, counts: Counts) -> Counter[Piece]:
        """Those of the batched plan, which fills its batches model by model."""
        size = self.swap.batches.size
        ends = np.cumsum(counts)
        starts = np.arange(0, ends[-1], size)
        stops = np.minimum(starts + size, ends[-1])
        models = 1 + np.searchsorted(ends, stops - 1, side="right") - np.searchsorted(ends, starts, side="right")
        pieces = Counter[Piece]()
        for (rows, count), times in zip(*_distinct(np.stack([stops - starts, models]), axis=1), strict=True):
            padded = self.swap.batches.padded(int(rows))
            # Rounded up, so that few pieces have to be timed.
            rounded = min(_power_of_two(int(count)), padded, len(self.swap.bank) + 1)
            pieces[Piece("batched", padded, rounded)] += int(times)
        return pieces

    def _choice(self, counts: Counts, now: bool) -> Choice:
        if self._size != self.swap.batches.size:
            self._size = self.swap.batches.size
            self._trials.forget()
        models, rows = len(counts), int(counts.sum())
        if self.wanted == "batched":
            self.batched()
        if self.wanted != "auto":
            return Choice(self.wanted, models, rows, {}, self.because)
        if models == 1:
            return Choice("swap", models, rows, {}, "there is one model")
        self._asked_forwards += int((-(-counts // self.swap.batches.size)).sum())
        if self._asked_forwards < _WORTH_MEASURING and _WRITE not in self._trials and not now:
            return Choice("swap", models, rows, {}, "there was too little work so far to measure")
        seconds = {"swap": self.seconds("swap", counts)}
        share = models * self._trials.seconds(_WRITE) / seconds["swap"]
        # Then the batched plan does the same work in more steps.
        if share < _NEGLIGIBLE and counts.min() >= self.swap.batches.size:
            reason = f"writing the models takes {share:.1%} of its time, and batches are full"
            return Choice("swap", models, rows, seconds, reason)
        self._asked_seconds += seconds["swap"]
        if self._asked_seconds < _WORTH_TRYING and not self.batched.tried and not now:
            reason = "there was too little work so far to make the batched plan for"
            return Choice("swap", models, rows, seconds, reason)
        return self._faster(counts, seconds, now)

    def _faster(self, counts: Counts, seconds: dict[str, float], now: bool) -> Choice:
        models, rows = len(counts), int(counts.sum())
        try:
            seconds["batched"] = self._try_batched(counts)
        except BatchedUnavailableError as error:
            return Choice("swap", models, rows, seconds, f"the batched plan is unavailable: {error}")
        pieces = [*self._swap_pieces(counts), *self._batched_pieces(counts)]
        while (
            abs(_gain(seconds)) < _CLOSE
            and (now or self._repeated_seconds < _REPEATING * self._asked_seconds)
            and (repeating := self._trials.repeat(pieces))
        ):
            self._repeated_seconds += repeating
            seconds = {plan: self.seconds(plan, counts) for plan in seconds}
        better = "batched" if _gain(seconds) > _WORTH_LEAVING else "swap"
        times = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
        return Choice(better, models, rows, seconds, f"predicted from measurements here: {times}")

    def _try_batched(self, counts: Counts) -> float:
        """Its predicted time. Where memory runs out it is given up, and the swap plan keeps the size of its batch.

        Raises BatchedUnavailableError with the reason.
        """
        self.batched()
        size = self.swap.batches.size
        try:
            seconds = self.seconds("batched", counts)
            fitted = self.swap.batches.size == size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fitted = False
        if not fitted:
            self.swap.batches.size = size
            self.batched.give_up(f"memory ran out when it was tried with batches of {size}")
            self.batched()
        return seconds


def row_counts(rows: Rows) -> Counts:
    """How many rows each model has that has any, in the order of the models."""
    counts: Counts = rows.model.unique(return_counts=True)[1].numpy()
    return counts


def _gain(seconds: dict[str, float]) -> float:
    """The share of the swap plan's time that batching saves."""
    return 1 - seconds["batched"] / seconds["swap"]


def _distinct(values: NDArray[np.int64], axis: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different values, or columns as rows, and how often each comes."""
    distinct, times = np.unique(values, axis=axis, return_counts=True)
    return distinct.T, times


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
