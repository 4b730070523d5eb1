"""`group_norm_silu` against eager PyTorch and Inductor at the shapes of UNets, channels-last, on one CPU thread."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.provenance import last_level_cache_bytes
from benchmarks.registry import Benchmark, Case, Contender
from guda_fast import _C
from guda_fast._backends import use_instruction_set
from guda_fast.ops import group_norm_silu

EPS = 1e-5


@dataclass(frozen=True)
class Inputs:
    """One input set. Parameters and time embedding have the map's dtype, as in a model cast to it."""

    x: Tensor
    groups: int
    weight: Tensor
    bias: Tensor
    addend: Tensor | None

    @staticmethod
    def random(rows: int, channels: int, side: int, dtype: torch.dtype, embedded: bool) -> Inputs:
        x = torch.randn(rows, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)
        affine = torch.randn(2, channels).to(dtype)
        addend = torch.randn(rows, channels).to(dtype) if embedded else None
        return Inputs(x, min(32, channels // 4), affine[0], affine[1], addend)


def _plain(x: Tensor, groups: int, weight: Tensor, bias: Tensor, addend: Tensor | None) -> Tensor:
    """As a residual block of diffusers does it."""
    if addend is not None:
        x = x + addend[:, :, None, None]
    return F.silu(F.group_norm(x, groups, weight, bias, EPS))


def _eager(sets: Sequence[Inputs], number: int) -> Tensor:
    inputs = sets[number]
    return _plain(inputs.x, inputs.groups, inputs.weight, inputs.bias, inputs.addend)


def _inductor(sets: Sequence[Inputs]) -> Callable[[int], Tensor]:
    # Past eight recompilations of one function "compiled" means eager, without a word.
    torch._dynamo.reset()
    compiled = torch.compile(_plain, fullgraph=True, dynamic=False)

    def call(number: int) -> Tensor:
        inputs = sets[number]
        result: Tensor = compiled(inputs.x, inputs.groups, inputs.weight, inputs.bias, inputs.addend)
        return result

    return call


def _fused(sets: Sequence[Inputs], instruction_set: str, number: int) -> Tensor:
    inputs = sets[number]
    with use_instruction_set(instruction_set):
        return group_norm_silu(
            inputs.x, inputs.groups, inputs.weight, inputs.bias, eps=EPS, addend=inputs.addend, backend="cpp"
        )


def keep_freed_memory() -> None:
    """Make malloc hand freed blocks out again instead of returning them to the system.

    Else every contender spends most of its time in page faults, which allocation patterns outside the op decide.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)):
        raise RuntimeError("mallopt refused to keep freed memory")


def _case(rows: int, channels: int, side: int, dtype: torch.dtype, embedded: bool, quick: bool) -> Case:
    keep_freed_memory()
    rows = max(rows // 16, 1) if quick else rows
    elements = rows * channels * side**2
    moved = 2 * elements * dtype.itemsize
    number = 2 if quick else 2 + 2 * last_level_cache_bytes() // moved
    sets = [Inputs.random(rows, channels, side, dtype, embedded) for _ in range(number)]
    capability = torch.backends.cpu.get_cpu_capability()
    return Case(
        op="group_norm_silu",
        shapes=f"R={rows} C={channels} {side}x{side}{' +embedding' if embedded else ''}",
        dtype=str(dtype).removeprefix("torch."),
        bytes=moved,
        input_sets=number,
        rival=Contender("eager", capability, partial(_eager, sets)),
        contenders=[
            Contender("inductor", capability, _inductor(sets)),
            *(Contender("cpp", name, partial(_fused, sets, name)) for name in _C.instruction_sets()),
        ],
    )


def _cases(quick: bool) -> list[Callable[[], Case]]:
    """The maps of `ddpm-cifar10` (128 and 256 channels), its up blocks (384, 512) and of the digits UNet (32, 64)."""
    maps = [(64, 128, 32), (64, 384, 16), (64, 256, 16), (64, 512, 8), (64, 256, 8), (64, 256, 4), (64, 32, 32),
            (64, 64, 8), (64, 64, 4)]  # fmt: skip
    table = [(*shape, dtype, False) for dtype in (torch.float32, torch.bfloat16) for shape in maps]
    table += [(64, 256, 16, dtype, True) for dtype in (torch.float32, torch.bfloat16)]
    return [partial(_case, *row, quick) for row in table]


BENCHMARK = Benchmark(
    name="group_norm_silu_cpu",
    cases=_cases,
    tests=("tests/test_group_norm_silu.py", "tests/test_group_norm_silu_native.py"),
)
