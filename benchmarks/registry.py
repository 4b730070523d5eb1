"""What a benchmark is, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Call = Callable[[int], object]
"""Runs once on one of the case's rotating input sets, whose number it gets."""


@dataclass(frozen=True)
class Contender:
    """One implementation of a case."""

    backend: str
    instruction_set: str
    call: Call


@dataclass(frozen=True)
class Case:
    """One op on one shape: a rival, and the contenders measured against it in the same run.

    bytes is what the op must at least read and write, from which the bandwidth follows.
    """

    op: str
    shapes: str
    dtype: str
    bytes: int
    input_sets: int
    rival: Contender
    contenders: Sequence[Contender]


@dataclass(frozen=True)
class Benchmark:
    """A named list of cases, made one after another, and the tests that must pass before any is measured."""

    name: str
    cases: Callable[[bool], Sequence[Callable[[], Case]]]
    tests: Sequence[str] = field(default_factory=tuple)


def benchmarks() -> dict[str, Benchmark]:
    """Every benchmark by name."""
    from benchmarks import delta_ops, noise_ops

    return {entry.name: entry for entry in (noise_ops.BENCHMARK, delta_ops.BENCHMARK)}
