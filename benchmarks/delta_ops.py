"""The delta ops against loops over models, batched weights and Inductor, on one CPU thread by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.provenance import last_level_cache_bytes
from benchmarks.registry import Benchmark, Case, Contender
from guda_fast.ops import delta_conv2d, delta_linear


class Shape(NamedTuple):
    """A layer of a UNet: its input without rows, and its weight."""

    x: tuple[int, ...]
    weight: tuple[int, ...]

    @property
    def is_conv(self) -> bool:
        return len(self.weight) == 4

    @property
    def positions(self) -> str:
        """Where the layer is applied in a row: pixels or tokens."""
        return f"at {self.x[1]}x{self.x[2]}" if self.is_conv else f"at {self.x[0]} tokens"

    def small(self) -> Shape:
        x = (4, *self.x[1:]) if self.is_conv else (self.x[0], 8)
        return Shape(x, (4, 4, 3, 3) if self.is_conv else (8, 8))

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1) if self.is_conv else F.linear(x, weight, bias)


@dataclass(frozen=True)
class Inputs:
    """One input set: a layer, its deltas, and the layers that merging would make of them, outside what is timed."""

    shape: Shape
    x: Tensor
    weight: Tensor
    bias: Tensor
    offsets: Tensor | None
    deltas: dict[str, Tensor]
    merged: list[tuple[Tensor, Tensor]]
    stacked: tuple[Tensor, Tensor]

    @staticmethod
    def random(shape: Shape, form: str, models: int, rows: int, dtype: torch.dtype) -> Inputs:
        def normal(*size: int) -> Tensor:
            return torch.randn(size).to(dtype)

        outputs = shape.weight[0]
        deltas = {"bias_delta": normal(models, outputs)}
        if form.startswith("rank"):
            rank = int(form.split()[1])
            deltas |= {"up": normal(models, outputs, rank), "down": normal(models, rank, *shape.weight[1:])}
            change = torch.stack([torch.tensordot(up, down, 1) for up, down in zip(deltas["up"], deltas["down"])])  # noqa: B905
        else:
            change = deltas["delta"] = normal(models, *shape.weight)
        shared = form == "shared input"
        x, weight, bias = normal(rows if shared else models * rows, *shape.x), normal(*shape.weight), normal(outputs)
        stacked = weight + change, bias + deltas["bias_delta"]
        return Inputs(
            shape=shape,
            x=x.to(memory_format=torch.channels_last) if shape.is_conv else x,
            weight=weight,
            bias=bias,
            offsets=None if shared else rows * torch.arange(models + 1),
            deltas=deltas,
            merged=list(zip(*stacked, strict=True)),
            stacked=stacked,
        )

    def parts(self) -> list[Tensor]:
        """Each model's rows."""
        models = len(self.merged)
        return [self.x] * models if self.offsets is None else list(self.x.chunk(models))

    @property
    def bytes(self) -> int:
        read = sum(tensor.nbytes for tensor in (self.x, self.weight, self.bias, *self.deltas.values()))
        return read + _merged_loop(self).nbytes


def _ours(inputs: Inputs) -> Tensor:
    op: Any = partial(delta_conv2d, padding=1) if inputs.shape.is_conv else delta_linear
    result: Tensor = op(
        inputs.x, inputs.weight, inputs.bias, offsets=inputs.offsets, backend="reference", **inputs.deltas
    )
    return result.flatten(0, 1) if inputs.offsets is None else result


def _merged_loop(inputs: Inputs) -> Tensor:
    return torch.cat([inputs.shape.apply(x, *layer) for x, layer in zip(inputs.parts(), inputs.merged, strict=True)])


def _unmerged_loop(inputs: Inputs) -> Tensor:
    """As PEFT runs adapters: the base for all rows, then each model's branch on its own."""
    apply, deltas = inputs.shape.apply, inputs.deltas
    base = apply(inputs.x, inputs.weight, inputs.bias)
    bases = [base] * len(inputs.merged) if inputs.offsets is None else base.chunk(len(inputs.merged))
    parts = []
    for k, (x, part) in enumerate(zip(inputs.parts(), bases, strict=True)):
        bias = deltas["bias_delta"][k]
        if "up" in deltas:
            up = deltas["up"][k]
            hidden = apply(x, deltas["down"][k])
            branch = F.conv2d(hidden, up[..., None, None], bias) if inputs.shape.is_conv else F.linear(hidden, up, bias)
        else:
            branch = apply(x, deltas["delta"][k], bias)
        parts.append(part + branch)
    return torch.cat(parts)


def _vmap(inputs: Inputs) -> Tensor:
    """One call for all models: a batched product, or a convolution of as many groups."""
    if inputs.offsets is None:
        result: Tensor = torch.func.vmap(inputs.shape.apply, in_dims=(None, 0, 0))(inputs.x, *inputs.stacked)
    else:
        rows = inputs.x.unflatten(0, (len(inputs.merged), -1))
        result = torch.func.vmap(inputs.shape.apply)(rows, *inputs.stacked)
    return result.flatten(0, 1)


SHAPES = [
    Shape((64, 512), (512, 512)),
    Shape((256, 128), (128, 128)),
    Shape((256, 8, 8), (256, 256, 3, 3)),
    Shape((64, 16, 16), (64, 64, 3, 3)),
]
DENSE, RANK_4, RANK_16, SHARED = FORMS = ["dense", "rank 4", "rank 16", "shared input"]
# Models x rows a model.
SEGMENTS = {
    torch.float32: {
        (1, 64): [DENSE, RANK_16],
        (10, 8): FORMS,
        (10, 1): [DENSE, RANK_16, SHARED],
        (100, 1): [DENSE, RANK_16, SHARED],
    },
    torch.bfloat16: {segments: [DENSE, RANK_16] for segments in ((10, 8), (10, 1), (100, 1))},
}


def _case(shape: Shape, models: int, rows: int, form: str, dtype: torch.dtype, quick: bool) -> Case:
    if quick:
        models, rows, shape = min(models, 3), min(rows, 2), shape.small()
    first = Inputs.random(shape, form, models, rows, dtype)
    number = 2 if quick else 2 + 2 * last_level_cache_bytes() // first.bytes
    sets = [first, *(Inputs.random(shape, form, models, rows, dtype) for _ in range(number - 1))]

    def contender(name: str, run: Callable[[Inputs], Tensor]) -> Contender:
        return Contender(name, torch.backends.cpu.get_cpu_capability(), lambda number: run(sets[number]))

    others = [contender("reference", _ours), contender("eager, unmerged", _unmerged_loop)]
    if not form.startswith("rank"):  # merged, they are what dense deltas are
        others.append(contender("vmap, merged", _vmap))
    # Inductor takes seconds for a loop over ten models, and minutes for a hundred.
    if (models, rows, dtype) == (10, 8, torch.float32) and form in (DENSE, RANK_16):
        # Past eight recompilations "compiled" would silently mean eager.
        torch._dynamo.reset()
        merged = form == DENSE
        name = f"torch.compile, {'merged' if merged else 'unmerged'}"
        others.append(contender(name, torch.compile(_merged_loop if merged else _unmerged_loop)))
    return Case(
        op="delta_conv2d" if shape.is_conv else "delta_linear",
        shapes=f"{models}x{rows} {'x'.join(map(str, shape.weight))} {shape.positions} {form}",
        dtype=str(dtype).removeprefix("torch."),
        bytes=first.bytes,
        input_sets=number,
        rival=contender("eager, merged", _merged_loop),
        contenders=others,
    )


def _cases(quick: bool) -> list[Callable[[], Case]]:
    return [
        partial(_case, shape, *segments, form, dtype, quick)
        for shape in SHAPES
        for dtype, table in SEGMENTS.items()
        for segments, forms in table.items()
        for form in forms
    ]


BENCHMARK = Benchmark(
    name="delta_ops_cpu",
    cases=_cases,
    tests=("tests/test_delta_linear.py", "tests/test_delta_conv2d.py"),
)
