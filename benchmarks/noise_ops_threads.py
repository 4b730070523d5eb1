"""How the fused noise ops scale from one thread to two, in the same run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.contenders import dtype_name
from benchmarks.noise_ops import Inputs, fused_add_noise, fused_error
from benchmarks.provenance import rotating_sets
from benchmarks.registry import Benchmark, Case, Contender
from guda_fast import _C

ELEMENTS = 4 * 2**20


def _case(op: str, instruction_set: str, dtype: torch.dtype, quick: bool) -> Case:
    """One thread is the rival, so the ratio of two is how much faster they are."""
    shape = (4, 32, 32)
    rows = ELEMENTS // torch.Size(shape).numel() // (64 if quick else 1)
    elements = rows * torch.Size(shape).numel()
    moved = elements * (8 if op == "add_noise" else 4 + dtype.itemsize)
    number = rotating_sets(moved, quick)
    sets = [Inputs.random(rows, shape, dtype, False) for _ in range(number)]
    call = fused_add_noise if op == "add_noise" else fused_error
    one, two = (Contender("cpp", instruction_set, partial(call, sets, instruction_set), n) for n in (1, 2))
    shapes = f"R={rows} S={'x'.join(map(str, shape))}"
    return Case(op, shapes, dtype_name(dtype), moved, number, rival=one, contenders=[two])


def _cases(quick: bool) -> list[Callable[[], Case]]:
    return [
        partial(_case, op, instruction_set, dtype, quick)
        for instruction_set in _C.instruction_sets()
        for op, dtype in (
            ("add_noise", torch.float32),
            ("denoising_error", torch.float32),
            ("denoising_error", torch.bfloat16),
        )
    ]


BENCHMARK = Benchmark(
    name="noise_ops_threads",
    cases=_cases,
    tests=("tests/test_native.py", "tests/test_add_noise*.py", "tests/test_denoising_error*.py"),
)
