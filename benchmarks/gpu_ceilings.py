"""What this GPU can do at best: copy memory, multiply bfloat16 matrices, and make the noise contract's normals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.contenders import architecture, default_device
from benchmarks.gpu_noise_ops import ELEMENTS
from benchmarks.provenance import rotating_sets
from benchmarks.registry import Benchmark, Case, Contender


def _copy(quick: bool) -> Case:
    """Bytes read and written, as everywhere."""
    elements = 2**14 if quick else 2**28
    moved = 8 * elements
    number = rotating_sets(moved, quick, default_device())
    sets = [(torch.randn(elements), torch.empty(elements)) for _ in range(number)]

    def copy(number: int) -> Tensor:
        source, target = sets[number]
        return target.copy_(source)

    rival = Contender("eager", architecture(), copy)
    return Case("copy", f"{elements} elements", "float32", moved, number, rival, [])


def _matmul(quick: bool) -> Case:
    """On random values: on zeros the same product runs faster than any real one."""
    size = 64 if quick else 8192
    sets = [tuple(torch.randn(size, size).bfloat16() for _ in range(2)) for _ in range(2)]
    rival = Contender("eager", architecture(), lambda number: torch.mm(*sets[number]))
    return Case("matmul", f"{size}x{size}x{size}", "bfloat16", 6 * size**2, 2, rival, [], flop=2 * size**3)


def _normals(quick: bool) -> Case:
    """As many normals as the noise ops' cases have elements, each program's summed to one number."""
    from benchmarks.gpu_normals import normals

    elements = 2**13 if quick else ELEMENTS
    rival = Contender("triton", architecture(), lambda number: normals(elements, seed=number))
    return Case("normals", f"{elements} elements", "float32", 0, 2, rival, [])


def _cases(quick: bool) -> list[Callable[[], Case]]:
    return [partial(make, quick) for make in (_copy, _matmul, _normals)]


BENCHMARK = Benchmark("gpu_ceilings", _cases, ("tests/test_triton.py",), device="cuda")
