"""What a benchmark is, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Call = Callable[[int], object]
"""Runs once on one of the case's rotating input sets, whose number it gets."""


@dataclass(frozen=True)
class Contender:
    """One implementation of a case; threads is given where it sets its own number of them."""

    backend: str
    instruction_set: str
    call: Call
    threads: int | None = None

    @property
    def label(self) -> str:
        if self.threads is None:
            return self.backend
        return f"{self.backend}, {self.threads} thread{'' if self.threads == 1 else 's'}"


@dataclass(frozen=True)
class Case:
    """One op on one shape: a rival, and the contenders measured against it in the same run.

    check is called before anything is timed, and raises where contenders do not compute the same.
    bytes is what the op must at least read and write, from which the bandwidth follows; flop is what it must
    multiply and add, 0 where that is beside the point.
    """

    op: str
    shapes: str
    dtype: str
    bytes: int
    input_sets: int
    rival: Contender
    contenders: Sequence[Contender]
    flop: int = 0
    check: Callable[[], None] | None = None


@dataclass(frozen=True)
class Benchmark:
    """A named list of cases, made one after another, and the tests that must pass before any is measured.

    cases: gets whether to be quick, and is called under `torch.device`, so that factories put tensors there
    tests: files, or patterns of files, from the checkout's root
    device: what it is meant for, "cpu" or "cuda"; with --quick it also runs on the other one
    threads, repetitions: where the command says nothing else
    """

    name: str
    cases: Callable[[bool], Sequence[Callable[[], Case]]]
    tests: Sequence[str] = field(default_factory=tuple)
    device: str = "cpu"
    threads: int = 1
    repetitions: int = 31


def benchmarks() -> dict[str, Benchmark]:
    """Every benchmark by name."""
    from benchmarks import (
        attention,
        conv3x3,
        delta_ops,
        frontends,
        gpu_ceilings,
        gpu_delta_ops,
        gpu_group_norm_silu,
        gpu_ladder,
        gpu_noise_ops,
        group_norm_silu,
        ladder,
        ladder_batches,
        ladder_large,
        ladder_protocol,
        ladder_reference,
        noise_ops,
        noise_ops_threads,
        pack,
        plans,
        retrack_step,
        together,
    )

    modules = (
        noise_ops,
        noise_ops_threads,
        group_norm_silu,
        attention,
        conv3x3,
        delta_ops,
        plans,
        pack,
        ladder,
        ladder_batches,
        ladder_large,
        ladder_protocol,
        ladder_reference,
        frontends,
        retrack_step,
        together,
        gpu_ceilings,
        gpu_noise_ops,
        gpu_group_norm_silu,
        gpu_delta_ops,
        gpu_ladder,
    )
    return {module.BENCHMARK.name: module.BENCHMARK for module in modules}
