"""What pieces of work take: each is run on a few rows like those of the run, when its time is first asked for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch

from guda_fast.diffusion.schedule import FloatArray
from guda_fast.forward.batches import Advance, Batches
from guda_fast.forward.noised import NoisedQueries
from guda_fast.forward.rows import BASE, Rows

_MODELS = 4  # are written when the time of writing one is measured
_AT_FIRST, _AT_MOST = 3, 12  # times that a piece is timed
_LONG = 0.2  # s; what takes longer is timed once


class Plan(Protocol):
    """What runs rows: see `SwapPlan.run`."""

    def run(self, queries: NoisedQueries, rows: Rows, advance: Advance) -> FloatArray: ...


class Piece(NamedTuple):
    """A piece of a plan's work.

    plan: "swap": a forward of ``rows`` rows of the resident model, or, with no rows, writing a model and whatever else
        a run does for each. "batched": a forward of ``rows`` rows, evenly of ``models`` models.
    """

    plan: str
    rows: int
    models: int = 1


class Trials:
    """The median time of each piece that was asked for.

    swap, batched: give the plans; the second is called at the first piece of its plan. models: counterfactuals there
    are. draws: of the protocol. probe: gives so many queries like those of the run. batches: how rows are padded.
    """

    def __init__(
        self,
        swap: Plan,
        batched: Callable[[], Plan],
        probe: Callable[[int], NoisedQueries],
        batches: Batches,
        models: int,
        draws: int,
    ) -> None:
        self._swap, self._batched, self._probe = swap, batched, probe
        self._batches, self._models, self._draws = batches, models, draws
        self._queries: NoisedQueries | None = None
        self._times: dict[Piece, list[float]] = {}
        self._next = 0

    def __contains__(self, piece: Piece) -> bool:
        return piece in self._times

    def seconds(self, piece: Piece) -> float:
        """The median of the times of a piece, which is timed now if it was not yet."""
        if piece not in self._times:
            self._time(piece)  # which makes what later calls reuse
            begin = time.perf_counter()
            self._times[piece] = [self._time(piece)]
            if time.perf_counter() - begin < _LONG:
                self._times[piece] += [self._time(piece) for _ in range(_AT_FIRST - 1)]
        return statistics.median(self._times[piece])

    def repeat(self, pieces: Iterable[Piece]) -> float:
        """Time each piece once more, one after another, except what was timed often enough or takes long.

        Returns the seconds it took, 0 where nothing was timed.
        """
        begin = time.perf_counter()
        # A piece that was never timed is one of a size that came up when memory ran out.
        again = [piece for piece in pieces if 1 < len(self._times.get(piece, ())) < _AT_MOST]
        for piece in again:
            self._times[piece].append(self._time(piece))
        return time.perf_counter() - begin if again else 0.0

    def forget(self) -> None:
        """Measure anew from here on."""
        self._times.clear()
        self._queries = None

    def _time(self, piece: Piece) -> float:
        if piece.plan == "batched":
            # Of other models at each call: in a run their parameters are in no cache.
            models = [(self._next + k) % (self._models + 1) for k in range(piece.models)]
            self._next += piece.models
            return self._clock(self._batched(), piece.rows, models)
        if piece.rows:
            return self._clock(self._swap, piece.rows, [BASE])
        forward = self.seconds(Piece("swap", self._batches.padded(1)))
        several = min(_MODELS, self._models)
        written = self._clock(self._swap, several + 1, list(range(several + 1)))
        return max(0.0, (written - forward) / several - forward)

    def _clock(self, plan: Plan, rows: int, models: list[int]) -> float:
        """Wall time of a run of so many rows, evenly of these models, with all that it starts on the current device."""
        if self._queries is None:
            self._queries = self._probe(-(-max(self._batches.size, _MODELS + 1) // self._draws))
        number = torch.arange(rows)
        place = number * len(models) // rows
        # Models have samples in common, as they do in a run: all draws of one query, then of the next.
        sample = number - torch.searchsorted(place, place)
        work = Rows(sample // self._draws, torch.tensor(models)[place], sample % self._draws)
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        plan.run(self._queries, work, _nothing)  # which ends when its errors are on the host
        return time.perf_counter() - begin


def _nothing(_: int) -> None:
    return None
