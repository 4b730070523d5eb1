"""`conv3x3` against PyTorch's convolution (oneDNN) and Inductor at the shapes of UNets, on one CPU thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import architecture, inductor
from benchmarks.group_norm_silu import keep_freed_memory
from benchmarks.registry import Benchmark, Case, Contender
from guda_fast import _C
from guda_fast._backends import use_instruction_set
from guda_fast.ops.conv3x3 import conv3x3


class Shape(NamedTuple):
    """Of one case: rows, input and output channels, height and width."""

    rows: int
    inputs: int
    outputs: int
    side: int


Inputs = tuple[Tensor, Tensor, Tensor]

# The small UNets at batch 64, the CIFAR-10 networks at batch 8, and as few tiles as the op takes.
SHAPES = [
    Shape(64, 32, 32, 32),
    Shape(64, 64, 64, 32),
    Shape(64, 96, 32, 32),
    Shape(64, 64, 64, 16),
    Shape(64, 128, 64, 16),
    Shape(64, 32, 32, 8),
    Shape(64, 64, 64, 4),
    Shape(8, 128, 128, 32),
    Shape(8, 256, 256, 16),
    Shape(8, 256, 256, 8),
    Shape(8, 512, 256, 8),
    Shape(1, 64, 64, 16),
    Shape(16, 64, 64, 4),
    Shape(16, 256, 256, 4),
]


def _inputs(shape: Shape) -> Inputs:
    """As in the engine's resident model: all in channels-last."""
    x = torch.randn(shape.rows, shape.inputs, shape.side, shape.side)
    weight = torch.randn(shape.outputs, shape.inputs, 3, 3) / (3 * shape.inputs**0.5)
    last = torch.channels_last
    return x.contiguous(memory_format=last), weight.contiguous(memory_format=last), torch.randn(shape.outputs)


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def _ours(sets: Sequence[Inputs], instruction_set: str, number: int) -> Tensor:
    with use_instruction_set(instruction_set):
        return conv3x3(*sets[number], backend="cpp")


def _case(shape: Shape, quick: bool) -> Case:
    keep_freed_memory()
    if quick:
        shape = shape._replace(rows=min(shape.rows, 16), side=min(shape.side, 4))
    # One layer finds what the last one wrote in the cache, as in a network.
    sets = [_inputs(shape)]
    moved = 4 * (shape.rows * (shape.inputs + shape.outputs) * shape.side**2 + 9 * shape.inputs * shape.outputs)
    return Case(
        op="conv3x3",
        shapes="B={0} {1}->{2} {3}x{3}".format(*shape),
        dtype="float32",
        bytes=moved,
        input_sets=1,
        rival=Contender("eager", architecture(), lambda number: _eager(*sets[number])),
        contenders=[
            inductor(_eager, lambda number: sets[number], quick),
            *(Contender("cpp", name, partial(_ours, sets, name)) for name in _C.instruction_sets()),
        ],
        flop=2 * 9 * shape.inputs * shape.outputs * shape.rows * shape.side**2,
    )


def _cases(quick: bool) -> list[Callable[[], Case]]:
    return [partial(_case, shape, quick) for shape in SHAPES]


BENCHMARK = Benchmark(
    name="conv3x3_cpu",
    cases=_cases,
    tests=("tests/test_conv3x3.py", "tests/test_conv3x3_native.py"),
)
