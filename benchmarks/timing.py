"""How long calls take: contenders in turn, on rotating input sets, by the device's own clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.registry import Contender

Stopwatch = Callable[[Callable[[], object]], Callable[[], float]]
"""Makes a call, and returns what tells its seconds once all calls are made."""

# Two milliseconds or so in which the host enqueues what is timed, a loop over ten models too: the device then does not
# wait for the host.
SPIN_CYCLES = 4_000_000


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition."""

    seconds: Sequence[float]

    def quantile(self, fraction: float) -> float:
        return float(torch.tensor(self.seconds, dtype=torch.float64).quantile(fraction))

    @property
    def median(self) -> float:
        return self.quantile(0.5)


def host_stopwatch(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    start = clock()
    call()
    seconds = clock() - start
    return lambda: seconds


def cuda_stopwatch(call: Callable[[], object]) -> Callable[[], float]:
    """Between two events on the current stream: what the device does, without the launch that precedes it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    call()
    end.record()

    def seconds() -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return seconds


def _wake(contender: Contender, number: int) -> None:
    """Give a contender its own number of threads, awake, as they are in a program that uses them all the time."""
    if contender.threads is not None:
        torch.set_num_threads(contender.threads)
        contender.call(number)


def measure(
    contenders: Sequence[Contender],
    input_sets: int,
    repetitions: int,
    stopwatch: Stopwatch = host_stopwatch,
) -> list[Timing]:
    """Time the contenders in turn, on rotating input sets, after one warm-up on each set.

    Interleaved, so that a change of the machine's speed meets all of them; every call takes the next set, so
    that none finds its inputs in a cache (sets together exceed the last level).
    """
    for contender in contenders:
        for number in range(input_sets):
            contender.call(number)
    readings: list[list[Callable[[], float]]] = [[] for _ in contenders]
    turn = 0
    for _ in range(repetitions):
        for own, contender in zip(readings, contenders, strict=True):
            turn += 1
            number = turn % input_sets
            _wake(contender, (turn - 1) % input_sets)
            own.append(stopwatch(lambda contender=contender, number=number: contender.call(number)))  # type: ignore[misc]
    return [Timing([seconds() for seconds in own]) for own in readings]
