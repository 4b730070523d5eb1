"""Times cases with their rivals interleaved, and writes one CSV row for each contender."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.memory import peak_extra_bytes
from benchmarks.provenance import ROOT, provenance
from benchmarks.registry import Benchmark, Case, Contender

COLUMNS = [
    "op",
    "backend",
    "shapes",
    "dtype",
    "threads",
    "instruction_set",
    "device",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "repetitions",
    "bytes",
    "gb_per_s",
    "peak_memory_mib",
    "rival",
    "rival_median_ms",
    "ratio",
    "python",
    "torch",
    "triton",
    "cuda",
    "guda_fast",
    "commit",
    "date",
]


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition."""

    seconds: Sequence[float]

    def quantile(self, fraction: float) -> float:
        return float(np.quantile(self.seconds, fraction))

    @property
    def median(self) -> float:
        return self.quantile(0.5)


def tests_pass(benchmark: Benchmark) -> bool:
    """Whether the tests of what is about to be measured pass; their output goes to the terminal."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *benchmark.tests]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def measure(
    contenders: Sequence[Contender],
    input_sets: int,
    repetitions: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time the contenders in turn, on rotating input sets, after one warm-up on each set.

    Interleaved, so that a change of the machine's speed meets all of them; every call takes the next set, so
    that none finds its inputs in a cache (sets together exceed the last level).
    """
    for contender in contenders:
        for number in range(input_sets):
            contender.call(number)
    seconds: list[list[float]] = [[] for _ in contenders]
    turn = 0
    for _ in range(repetitions):
        for own, contender in zip(seconds, contenders, strict=True):
            turn += 1
            start = clock()
            contender.call(turn % input_sets)
            own.append(clock() - start)
    return [Timing(own) for own in seconds]


def case_rows(case: Case, repetitions: int, shared: dict[str, str]) -> Iterator[dict[str, object]]:
    """The rival's row, whose ratio is 1, then one for each contender."""
    everyone = [case.rival, *case.contenders]
    timings = measure(everyone, case.input_sets, repetitions)
    for contender, timing in zip(everyone, timings, strict=True):
        peak = peak_extra_bytes(lambda contender=contender: contender.call(0))  # type: ignore[misc]
        yield {
            "op": case.op,
            "backend": contender.backend,
            "shapes": case.shapes,
            "dtype": case.dtype,
            "threads": torch.get_num_threads(),
            "instruction_set": contender.instruction_set,
            "median_ms": f"{timing.median * 1e3:.3f}",
            "p20_ms": f"{timing.quantile(0.2) * 1e3:.3f}",
            "p80_ms": f"{timing.quantile(0.8) * 1e3:.3f}",
            "repetitions": repetitions,
            "bytes": case.bytes,
            "gb_per_s": f"{case.bytes / timing.median / 1e9:.2f}",
            "peak_memory_mib": "" if peak is None else f"{peak / 2**20:.1f}",
            "rival": case.rival.backend,
            "rival_median_ms": f"{timings[0].median * 1e3:.3f}",
            "ratio": f"{timings[0].median / timing.median:.2f}",
            **shared,
        }


def run(benchmark: Benchmark, out: Path, *, threads: int, repetitions: int, quick: bool) -> bool:
    """Test, measure, print and write; False, with nothing measured, where the tests fail."""
    if not tests_pass(benchmark):
        print(f"{benchmark.name}: its tests fail, so nothing is measured", file=sys.stderr)
        return False
    torch.set_num_threads(threads)
    shared = provenance()
    rows: list[dict[str, object]] = []
    for make_case in benchmark.cases(quick):
        for row in case_rows(make_case(), repetitions, shared):
            print("{op:16} {shapes:34} {dtype:9} {backend:19} {instruction_set:8}".format(**row), end=" ")
            print("{median_ms:>9} ms  {gb_per_s:>6} GB/s  {ratio:>6}x".format(**row), flush=True)
            rows.append(row)
    write_csv(out, rows)
    return True


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """All rows or none: the file appears under its name when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
