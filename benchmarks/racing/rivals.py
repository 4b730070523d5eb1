"""Ways to find the top group with fewer forwards, on arrays of differences: what racing must beat.

A rival gets differences w_t (e_k - e_0) of queries, groups and draws by rising timestep [(N, K, D), float64], of which
it may use what it pays for, and a seed for what it draws. It returns the top group of each query, and the forwards that
it took, those of the base among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy import stats

from guda_fast.diffusion.schedule import FloatArray

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Outcome:
    """top: of each query [(N,), int64]. forwards: in all, with those of the base."""

    top: IntArray
    forwards: int


class Contender(Protocol):
    """A rival at one of its settings. random: whether seeds make a difference."""

    @property
    def name(self) -> str: ...
    @property
    def setting(self) -> str: ...
    @property
    def random(self) -> bool: ...
    def run(self, differences: FloatArray, seed: int) -> Outcome: ...


@dataclass(frozen=True)
class Strided:
    """Every stride-th timestep, for all queries the same: from the lowest or from a random one on."""

    stride: int
    lowest: bool

    @property
    def name(self) -> str:
        return f"evenly strided{'' if self.lowest else ', random start'}"

    @property
    def setting(self) -> str:
        return f"every {self.stride}th"

    @property
    def random(self) -> bool:
        return not self.lowest

    def run(self, differences: FloatArray, seed: int) -> Outcome:
        queries, groups, _ = differences.shape
        offset = 0 if self.lowest else int(np.random.default_rng(seed).integers(self.stride))
        drawn = differences[:, :, offset :: self.stride]
        return Outcome(drawn.sum(axis=2).argmax(axis=1), queries * (groups + 1) * drawn.shape[2])


@dataclass(frozen=True)
class Lowest:
    """The lowest timesteps alone: biased, but where most of the variance is."""

    count: int
    name = "lowest timesteps"
    random = False

    @property
    def setting(self) -> str:
        return f"{self.count} timesteps"

    def run(self, differences: FloatArray, seed: int) -> Outcome:
        queries, groups, _ = differences.shape
        return Outcome(differences[:, :, : self.count].sum(axis=2).argmax(axis=1), queries * (groups + 1) * self.count)


@dataclass(frozen=True)
class Random:
    """Random timesteps, others for each query."""

    count: int
    name = "random timesteps"
    random = True

    @property
    def setting(self) -> str:
        return f"{self.count} timesteps"

    def run(self, differences: FloatArray, seed: int) -> Outcome:
        queries, groups, draws = differences.shape
        order = np.random.default_rng(seed).random((queries, draws)).argsort(axis=1)[:, : self.count]
        drawn = np.take_along_axis(differences, order[:, None], axis=2)
        return Outcome(drawn.sum(axis=2).argmax(axis=1), queries * (groups + 1) * self.count)


@dataclass(frozen=True)
class Elimination:
    """Even draws, and at each look groups are dropped whose normal interval lies below the leader's.

    The draws of a look are spread evenly: the bit-reversed order of the timesteps, shifted at random. The intervals are
    mean +- z s / sqrt(n), times sqrt(1 - n/D) because D draws are all there is. paired: of the differences to the
    leader, which have the noise in common, and not of each cell.
    """

    alpha: float
    paired: bool
    random = True

    @property
    def setting(self) -> str:
        return f"alpha {self.alpha:g}"

    @property
    def name(self) -> str:
        return f"elimination, {'paired' if self.paired else 'per-cell'} intervals"

    def run(self, differences: FloatArray, seed: int) -> Outcome:
        queries, groups, draws = differences.shape
        order = (bit_reversed(draws) + int(np.random.default_rng(seed).integers(draws))) % draws
        alive, paid, base = np.ones((queries, groups), dtype=bool), 0, 0
        z, before = float(stats.norm.isf(self.alpha / 2)), 0
        for look in looks(draws):
            racing = alive.sum(axis=1) > 1
            paid += int((look - before) * alive[racing].sum())
            base += int((look - before) * racing.sum())
            drawn = differences[racing][:, :, order[:look]]
            mean = np.where(alive[racing], drawn.mean(axis=2), -np.inf)
            leader = mean.argmax(axis=1)
            half = z * math.sqrt((1 - look / draws) / look) * self._deviation(drawn, leader)
            alive[racing] &= mean + half >= np.take_along_axis(mean, leader[:, None], axis=1)
            before = look
        # Who is left at D is decided by exact sums; every other query has its one group.
        exact = np.where(alive, differences.sum(axis=2), -np.inf)
        return Outcome(exact.argmax(axis=1), paid + base)

    def _deviation(self, drawn: FloatArray, leader: IntArray) -> FloatArray:
        """Such that leader and group differ by less than this times z / sqrt(n), where both may be the better one."""
        best = np.take_along_axis(drawn, leader[:, None, None], axis=1)
        if self.paired:
            paired: FloatArray = (best - drawn).std(axis=2, ddof=1)
            return paired
        apart: FloatArray = best.std(axis=2, ddof=1) + drawn.std(axis=2, ddof=1)
        return apart


def bit_reversed(count: int) -> IntArray:
    """0..count-1 in an order whose beginnings are spread evenly.

    >>> bit_reversed(6).tolist()
    [0, 4, 2, 1, 5, 3]
    """
    bits = max(1, (count - 1).bit_length())
    order = [int(f"{index:0{bits}b}"[::-1], 2) for index in range(2**bits)]
    return np.array([index for index in order if index < count])


def looks(draws: int) -> Sequence[int]:
    """After how many draws elimination decides: from four on, half as many again each time, and all."""
    found = [4]
    while found[-1] * 1.5 < draws:
        found.append(int(found[-1] * 1.5))
    return [*found, draws] if draws > found[0] else [draws]


def settings(draws: int) -> Sequence[Contender]:
    """Points of each rival's curve, from dear to cheap."""
    counts = [count for count in (50, 25, 12, 6, 3, 2, 1) if count < draws]
    strides = [stride for stride in (2, 4, 8, 16, 32, 64) if stride < draws]
    alphas = (1e-4, 1e-3, 1e-2, 0.05, 0.2, 0.5)
    return [
        *(Strided(stride, lowest) for lowest in (True, False) for stride in strides),
        *map(Random, counts),
        *map(Lowest, counts),
        *(Elimination(alpha, paired) for paired in (False, True) for alpha in alphas),
    ]
