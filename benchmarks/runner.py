"""Measures the cases of a benchmark, and writes one CSV row for each contender."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.memory import peak_extra_bytes
from benchmarks.provenance import ROOT, provenance
from benchmarks.registry import Benchmark, Case
from benchmarks.timing import cuda_stopwatch, host_stopwatch, measure

RESULTS = ROOT / "benchmarks" / "results"
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
    "tflop_per_s",
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
    "command",
]


@dataclass(frozen=True)
class Settings:
    """How to run a benchmark; None is what the benchmark itself says."""

    threads: int | None = None
    repetitions: int | None = None
    quick: bool = False
    device: str | None = None

    def command(self, name: str) -> str:
        """What to type for the same rows."""
        given = [f"python -m benchmarks run {name}"]
        given += [f"--threads {self.threads}"] if self.threads is not None else []
        given += [f"--repetitions {self.repetitions}"] if self.repetitions is not None else []
        given += ["--quick"] if self.quick else []
        given += [f"--device {self.device}"] if self.device is not None else []
        return " ".join(given)


def missing_device(benchmark: Benchmark, settings: Settings) -> str | None:
    """Why the benchmark cannot run here, or None."""
    device = settings.device or benchmark.device
    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU (--device cpu --quick runs it on the CPU, without measuring anything)"
    if device != benchmark.device and not settings.quick:
        return f"it measures {benchmark.device}; another device is for trying it out, with --quick"
    return None


def use_interpreter(benchmark: Benchmark, settings: Settings) -> None:
    """Let Triton's interpreter run what is meant for a GPU, where it goes to the CPU; before triton is imported."""
    if benchmark.device == "cuda" and settings.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


def test_files(benchmark: Benchmark) -> tuple[list[str], list[str]]:
    """The test files of a benchmark, and the names of those left out, which import what is not installed."""
    files = sorted({path for pattern in benchmark.tests for path in ROOT.glob(pattern)})
    absent = [name for name in ("hypothesis", "diffusers") if importlib.util.find_spec(name) is None]
    lines = tuple(f"{word} {name}" for word in ("import", "from") for name in absent)
    left_out = [path for path in files if any(line.startswith(lines) for line in path.read_text().splitlines())]
    return [str(path) for path in files if path not in left_out], [path.name for path in left_out]


def tests_pass(benchmark: Benchmark) -> bool:
    """Whether the tests of what is about to be measured pass; their output goes to the terminal."""
    files, left_out = test_files(benchmark)
    if left_out:
        print(f"{benchmark.name}: left out for want of hypothesis or diffusers: {', '.join(left_out)}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *files]
    return bool(files) and subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def case_rows(case: Case, repetitions: int, device: str, shared: dict[str, str]) -> Iterator[dict[str, object]]:
    """The rival's row, whose ratio is 1, then one for each contender."""
    everyone = [case.rival, *case.contenders]
    stopwatch = cuda_stopwatch if device == "cuda" else host_stopwatch
    threads = torch.get_num_threads()
    if case.check is not None:
        case.check()
    timings = measure(everyone, case.input_sets, repetitions, stopwatch)
    for contender, timing in zip(everyone, timings, strict=True):
        peak = peak_extra_bytes(lambda contender=contender: contender.call(0), device)  # type: ignore[misc]
        yield {
            "op": case.op,
            "backend": contender.backend,
            "shapes": case.shapes,
            "dtype": case.dtype,
            "threads": contender.threads or threads,
            "instruction_set": contender.instruction_set,
            "median_ms": f"{timing.median * 1e3:.4g}",
            "p20_ms": f"{timing.quantile(0.2) * 1e3:.4g}",
            "p80_ms": f"{timing.quantile(0.8) * 1e3:.4g}",
            "repetitions": repetitions,
            "bytes": case.bytes,
            "gb_per_s": f"{case.bytes / timing.median / 1e9:.4g}",
            "tflop_per_s": f"{case.flop / timing.median / 1e12:.4g}" if case.flop else "",
            "peak_memory_mib": "" if peak is None else f"{peak / 2**20:.1f}",
            "rival": case.rival.label,
            "rival_median_ms": f"{timings[0].median * 1e3:.4g}",
            "ratio": f"{timings[0].median / timing.median:.4g}",
            **shared,
        }
    torch.set_num_threads(threads)


def run(benchmark: Benchmark, out: Path, settings: Settings) -> bool:
    """Test, measure, print and write; False, with nothing measured, where the tests fail."""
    if not tests_pass(benchmark):
        print(f"{benchmark.name}: its tests fail, so nothing is measured", file=sys.stderr)
        return False
    measure_cases(benchmark, out, settings)
    return True


def measure_cases(benchmark: Benchmark, out: Path, settings: Settings) -> None:
    """Measure every case of a benchmark whose tests passed.

    Rows are kept in a .partial file from the first case on, and under their name when all are there.
    """
    device = settings.device or benchmark.device
    torch.set_num_threads(settings.threads or benchmark.threads)
    repetitions = settings.repetitions or benchmark.repetitions
    shared = {**provenance(device), "command": settings.command(benchmark.name)}
    rows: list[dict[str, object]] = []
    unfinished = out.with_suffix(".partial")
    with torch.device(device):
        cases = benchmark.cases(settings.quick)
    for make_case in cases:
        with torch.device(device):
            case = make_case()
        for row in case_rows(case, repetitions, device, shared):
            print("{op:16} {shapes:34} {dtype:9} {backend:19} {instruction_set:8}".format(**row), end=" ")
            print("{median_ms:>9} ms  {gb_per_s:>6} GB/s  {ratio:>6}x".format(**row), flush=True)
            rows.append(row)
        write_csv(unfinished, rows)
        # Or its tensors would stand beside those of the next.
        del case
    unfinished.replace(out)


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
