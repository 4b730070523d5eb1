"""The fused noise ops against eager PyTorch that makes its own noise, on one CPU thread by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.provenance import rotating_sets
from benchmarks.registry import Benchmark, Case, Contender
from guda_fast import _C
from guda_fast._backends import use_instruction_set
from guda_fast.ops import add_noise, denoising_error

SEED = 42


@dataclass(frozen=True)
class Inputs:
    """One input set: rows of one query each, so that eager PyTorch needs no gather."""

    x0: Tensor
    predictions: Tensor
    out: Tensor
    rows: tuple[Tensor, ...]
    weight: Tensor

    @staticmethod
    def random(rows: int, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, models: int = 1) -> Inputs:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x0 = torch.randn(rows, *shape)
        return Inputs(
            x0=x0,
            predictions=torch.randn(models * rows, *shape, dtype=dtype)
            .to(memory_format=layout)
            .unflatten(0, (models, rows)),
            out=torch.empty_like(x0),
            rows=(
                torch.arange(rows),
                torch.randint(-(2**62), 2**62, (rows,)),
                torch.randint(0, 1000, (rows,)),
                torch.zeros(rows, dtype=torch.int64),
                torch.rand(rows),
                torch.rand(rows),
            ),
            weight=torch.rand(rows, dtype=torch.float64),
        )

    def columns(self) -> tuple[Tensor, Tensor]:
        """The two scales, shaped to broadcast over x0."""
        shape = (-1, *([1] * (self.x0.dim() - 1)))
        return self.rows[4].view(shape), self.rows[5].view(shape)


def eager_target(inputs: Inputs) -> Tensor:
    """In place in a buffer that is kept: the least memory traffic that eager operations allow."""
    x0_scale, eps_scale = inputs.columns()
    return inputs.out.normal_().mul_(eps_scale).addcmul_(inputs.x0, x0_scale)


def _eager_error(inputs: Inputs, sums: torch.dtype) -> Tensor:
    """Float32 differences and squares, summed in ``sums``; the fastest of seven ways with float64 sums."""
    squares = eager_target(inputs).sub_(inputs.predictions[0]).square_()
    return squares.flatten(1).sum(1, dtype=sums) * inputs.weight


def fused_add_noise(sets: Sequence[Inputs], instruction_set: str, number: int) -> Tensor:
    inputs = sets[number]
    with use_instruction_set(instruction_set):
        return add_noise(inputs.x0, *inputs.rows, seed=SEED, out=inputs.out, backend="cpp")


def fused_error(sets: Sequence[Inputs], instruction_set: str, number: int) -> Tensor:
    inputs = sets[number]
    with use_instruction_set(instruction_set):
        return denoising_error(
            inputs.predictions, inputs.x0, *inputs.rows, inputs.weight, seed=SEED, backend="cpp"
        ).errors


def _case(op: str, rows: int, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, quick: bool) -> Case:
    rows = max(rows // 64, 1) if quick else rows
    elements = rows * torch.Size(shape).numel()
    per_element = 8 if op == "add_noise" else 4 + dtype.itemsize
    number = rotating_sets(elements * per_element, quick)
    sets = [Inputs.random(rows, shape, dtype, channels_last) for _ in range(number)]
    layout = " channels-last" if channels_last else ""
    return Case(
        op=op,
        shapes=f"R={rows} S={'x'.join(map(str, shape))}{layout}",
        dtype=str(dtype).removeprefix("torch."),
        bytes=elements * per_element,
        input_sets=number,
        rival=_eager(sets, op, torch.float64),
        contenders=[
            *([_eager(sets, op, torch.float32)] if op == "denoising_error" else []),
            *(_fused(sets, op, name) for name in _C.instruction_sets()),
        ],
    )


def _eager(sets: Sequence[Inputs], op: str, sums: torch.dtype) -> Contender:
    """With float64 sums what the op promises; with float32 sums faster, and less exact than the op."""
    capability = torch.backends.cpu.get_cpu_capability()
    if op == "add_noise":
        return Contender("eager", capability, lambda number: eager_target(sets[number]))
    name = "eager" if sums is torch.float64 else "eager, float32 sums"
    return Contender(name, capability, lambda number: _eager_error(sets[number], sums))


def _fused(sets: Sequence[Inputs], op: str, instruction_set: str) -> Contender:
    call = fused_add_noise if op == "add_noise" else fused_error
    return Contender("cpp", instruction_set, partial(call, sets, instruction_set))


def _cases(quick: bool) -> list[Callable[[], Case]]:
    """4 Mi elements each."""
    latents, digits = (1024, (4, 32, 32)), (65536, (1, 8, 8))
    table = [
        ("add_noise", *latents, torch.float32, False),
        ("add_noise", *digits, torch.float32, False),
        ("denoising_error", *latents, torch.float32, False),
        ("denoising_error", *latents, torch.bfloat16, False),
        ("denoising_error", *latents, torch.float16, False),
        ("denoising_error", *latents, torch.float32, True),
        ("denoising_error", *digits, torch.float32, False),
    ]
    return [partial(_case, *row, quick) for row in table]


BENCHMARK = Benchmark(
    name="noise_ops_cpu",
    cases=_cases,
    tests=("tests/test_native.py", "tests/test_add_noise*.py", "tests/test_denoising_error*.py"),
)
