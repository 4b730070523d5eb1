"""The fused noise ops on a GPU, against eager PyTorch and Inductor that make their own noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.contenders import architecture, default_device, dtype_name, inductor, kernels
from benchmarks.noise_ops import SEED, Inputs, eager_target
from benchmarks.provenance import rotating_sets
from benchmarks.registry import Benchmark, Case, Contender
from guda_fast.ops import add_noise, denoising_error

# Of x0 in a case.
ELEMENTS = 64 * 2**20


def _inputs(models: int, rows: int, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Inputs:
    """As on the CPU, with the queries and the result in the predictions' layout too."""
    inputs = Inputs.random(rows, shape, dtype, channels_last, models)
    x0 = inputs.x0.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return replace(inputs, x0=x0, out=torch.empty_like(x0))


def eager_error(inputs: Inputs) -> Tensor:
    """Float32 differences and squares, summed in float64 as the op does; one model after another."""
    target = eager_target(inputs)
    errors = [
        prediction.sub(target).square_().flatten(1).sum(1, dtype=torch.float64) for prediction in inputs.predictions
    ]
    return torch.stack(errors) * inputs.weight


def plain_target(x0: Tensor, x0_scale: Tensor, eps_scale: Tensor) -> Tensor:
    return x0 * x0_scale + torch.randn_like(x0) * eps_scale


def plain_error(predictions: Tensor, x0: Tensor, x0_scale: Tensor, eps_scale: Tensor, weight: Tensor) -> Tensor:
    difference = predictions.float() - plain_target(x0, x0_scale, eps_scale)
    return difference.square().flatten(2).sum(2, dtype=torch.float64) * weight


def _contenders(op: str, sets: Sequence[Inputs], quick: bool) -> tuple[Contender, list[Contender]]:
    """The rival, and those measured against it."""

    def fused(backend: str, number: int) -> object:
        inputs = sets[number]
        if op == "add_noise":
            return add_noise(inputs.x0, *inputs.rows, seed=SEED, out=inputs.out, backend=backend)
        arguments = (inputs.predictions, inputs.x0, *inputs.rows, inputs.weight)
        return denoising_error(*arguments, seed=SEED, backend=backend).errors

    def plain_arguments(number: int) -> tuple[Tensor, ...]:
        inputs = sets[number]
        if op == "add_noise":
            return (inputs.x0, *inputs.columns())
        return (inputs.predictions, inputs.x0, *inputs.columns(), inputs.weight)

    eager, plain = (eager_target, plain_target) if op == "add_noise" else (eager_error, plain_error)
    rival = Contender("eager", architecture(), lambda number: eager(sets[number]))
    return rival, [inductor(plain, plain_arguments, quick), *kernels(op, fused)]


def _case(op: str, models: int, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, quick: bool) -> Case:
    rows = 2 if quick else ELEMENTS // torch.Size(shape).numel()
    elements = rows * torch.Size(shape).numel()
    moved = 8 * elements if op == "add_noise" else (4 + models * dtype.itemsize) * elements
    number = rotating_sets(moved, quick, default_device())
    sets = [_inputs(models, rows, shape, dtype, channels_last) for _ in range(number)]
    rival, contenders = _contenders(op, sets, quick)
    named = f"M={models} " if op == "denoising_error" else ""
    layout = " channels-last" if channels_last else ""
    shapes = f"{named}R={rows} S={'x'.join(map(str, shape))}{layout}"
    return Case(op, shapes, dtype_name(dtype), moved, number, rival, contenders)


def _cases(quick: bool) -> list[Callable[[], Case]]:
    latents, images = (4, 64, 64), (3, 32, 32)
    table = [("add_noise", 1, shape, torch.float32, last) for shape in (latents, images) for last in (False, True)]
    table += [
        ("denoising_error", models, latents, dtype, last)
        for models in (1, 4, 11)
        for dtype in (torch.float32, torch.bfloat16)
        for last in (False, True)
    ]
    table.append(("denoising_error", 11, images, torch.bfloat16, True))
    if quick:
        small = ((op, min(models, 2), (shape[0], 6, 6), dtype, last) for op, models, shape, dtype, last in table)
        table = list(dict.fromkeys(small))
    return [partial(_case, *row, quick) for row in table]


BENCHMARK = Benchmark(
    name="gpu_noise_ops",
    cases=_cases,
    tests=(
        "tests/test_triton.py",
        "tests/test_cuda*.py",
        "tests/test_add_noise.py",
        "tests/test_denoising_error.py",
        "tests/test_library.py",
    ),
    device="cuda",
)
