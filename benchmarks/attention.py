"""`attention` against PyTorch's flash attention and Inductor at the shapes of UNets, on one CPU thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import architecture, dtype_name, inductor
from benchmarks.group_norm_silu import keep_freed_memory
from benchmarks.provenance import last_level_cache_bytes
from benchmarks.registry import Benchmark, Case, Contender
from guda_fast import _C
from guda_fast._backends import use_instruction_set
from guda_fast.ops.attention import MAX_DIM, attention


class Shape(NamedTuple):
    """Of one case: rows, heads, queries, keys and dimensions of a head."""

    rows: int
    heads: int
    queries: int
    keys: int
    dim: int


Inputs = tuple[Tensor, Tensor, Tensor]

# diffusers' default head dimension of 8 at three resolutions, one wide head, Stable Diffusion's self- and
# cross-attention (40), and the small UNet with wider heads.
SHAPES = [
    Shape(64, 8, 256, 256, 8),
    Shape(64, 8, 64, 64, 8),
    Shape(64, 8, 16, 16, 8),
    Shape(64, 4, 256, 256, 16),
    Shape(64, 2, 256, 256, 32),
    Shape(16, 1, 256, 256, 256),
    Shape(8, 8, 1024, 1024, 40),
    Shape(8, 8, 1024, 77, 40),
]


def _inputs(shape: Shape, dtype: torch.dtype) -> Inputs:
    """As diffusers makes them: views of (rows, positions, heads, dim) memory."""

    def tokens(positions: int) -> Tensor:
        return torch.randn(shape.rows, positions, shape.heads, shape.dim).to(dtype).transpose(1, 2)

    return tokens(shape.queries), tokens(shape.keys), tokens(shape.keys)


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, 3) @ v


def _ours(sets: Sequence[Inputs], instruction_set: str, number: int) -> Tensor:
    with use_instruction_set(instruction_set):
        return attention(*sets[number], backend="cpp")


def _case(shape: Shape, dtype: torch.dtype, quick: bool) -> Case:
    keep_freed_memory()
    if quick:
        shape = shape._replace(rows=1, queries=min(shape.queries, 64), keys=min(shape.keys, 64))
    moved = 2 * shape.rows * shape.heads * (shape.queries + shape.keys) * shape.dim * dtype.itemsize
    number = 2 if quick else 2 + 2 * last_level_cache_bytes() // moved
    sets = [_inputs(shape, dtype) for _ in range(number)]
    names = [name for name in _C.instruction_sets() if shape.dim <= MAX_DIM[name]]
    return Case(
        op="attention",
        shapes="B={} heads={} {}x{} D={}".format(*shape),
        dtype=dtype_name(dtype),
        bytes=moved,
        input_sets=number,
        rival=Contender("flash", architecture(), lambda number: F.scaled_dot_product_attention(*sets[number])),
        contenders=[
            inductor(_math, lambda number: sets[number], quick),
            *(Contender("cpp", name, partial(_ours, sets, name)) for name in names),
        ],
        flop=4 * shape.rows * shape.heads * shape.queries * shape.keys * shape.dim,
    )


def _cases(quick: bool) -> list[Callable[[], Case]]:
    return [partial(_case, shape, dtype, quick) for dtype in (torch.float32, torch.bfloat16) for shape in SHAPES]


BENCHMARK = Benchmark(
    name="attention_cpu",
    cases=_cases,
    tests=("tests/test_attention.py", "tests/test_attention_native.py"),
)
