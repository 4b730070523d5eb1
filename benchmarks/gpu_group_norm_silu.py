"""`group_norm_silu` on a GPU at the UNets' shapes, against eager PyTorch in both layouts and Inductor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import architecture, default_device, dtype_name, inductor, kernels
from benchmarks.provenance import rotating_sets
from benchmarks.registry import Benchmark, Case, Contender
from guda_fast.ops import group_norm_silu

GROUPS = 32

Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None]


def plain(x: Tensor, weight: Tensor, bias: Tensor, addend: Tensor | None) -> Tensor:
    if addend is not None:
        x = x + addend[..., None, None]
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def _case(rows: int, channels: int, side: int, dtype: torch.dtype, with_addend: bool, quick: bool) -> Case:
    """The rival is eager channels-first; everything else gets the same numbers in channels-last."""
    moved = 2 * rows * channels * side**2 * dtype.itemsize
    number = rotating_sets(moved, quick, default_device())

    def arguments() -> Arguments:
        x = torch.randn(rows, channels, side, side, dtype=dtype)
        vectors = (torch.randn(channels, dtype=dtype), torch.randn(channels, dtype=dtype))
        return (x, *vectors, torch.randn(rows, channels, dtype=dtype) if with_addend else None)

    first = [arguments() for _ in range(number)]
    last = [(x.to(memory_format=torch.channels_last), *vectors) for x, *vectors in first]

    def fused(backend: str, number: int) -> Tensor:
        x, weight, bias, addend = last[number]
        return group_norm_silu(x, GROUPS, weight, bias, addend=addend, backend=backend)

    return Case(
        op="group_norm_silu",
        shapes=f"{rows}x{channels}x{side}x{side} G={GROUPS}{' addend' if with_addend else ''}",
        dtype=dtype_name(dtype),
        bytes=moved,
        input_sets=number,
        rival=Contender("eager", architecture(), lambda number: plain(*first[number])),
        contenders=[
            Contender("eager channels-last", architecture(), lambda number: plain(*last[number])),
            inductor(plain, lambda number: tuple(last[number]), quick),
            *kernels("group_norm_silu", fused),
        ],
    )


def _cases(quick: bool) -> list[Callable[[], Case]]:
    """Batches of 512 CIFAR images, then of 64 Stable Diffusion latents."""
    table = [
        (rows, channels, side, dtype, with_addend)
        for rows, channels, side, with_addend in (
            (512, 128, 32, False),
            (512, 256, 16, False),
            (512, 256, 16, True),
            (512, 256, 8, False),
            (64, 320, 64, False),
            (64, 640, 32, True),
            (64, 1280, 16, False),
        )
        for dtype in (torch.bfloat16, torch.float32)
    ]
    if quick:
        table = list(dict.fromkeys((2, 64, 4, dtype, with_addend) for *_, dtype, with_addend in table))
    return [partial(_case, *row, quick) for row in table]


BENCHMARK = Benchmark(
    name="gpu_group_norm_silu",
    cases=_cases,
    tests=("tests/test_group_norm_silu*.py", "tests/test_fuse*.py"),
    device="cuda",
)
