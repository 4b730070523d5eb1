"""The delta ops on a GPU: all rows of all models in one launch, against one library call a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import architecture, default_device, dtype_name, kernels
from benchmarks.provenance import rotating_sets
from benchmarks.registry import Benchmark, Case, Contender
from guda_fast.ops import delta_conv2d, delta_linear

DTYPE = torch.bfloat16

Inputs = tuple[Tensor, Tensor, dict[str, Tensor]]
"""x, the base weight, and what else the op takes."""


@dataclass(frozen=True)
class Layer:
    """One layer of all models, a convolution where the weight has four dimensions."""

    rows: int  # of each model; 0: all models share `shared` rows
    x: tuple[int, ...]  # of a row
    weight: tuple[int, ...]
    rank: int | None  # None: dense deltas
    models: int = 10
    shared: int = 64

    @property
    def is_convolution(self) -> bool:
        return len(self.weight) == 4

    @property
    def total(self) -> int:
        return self.models * self.rows or self.shared

    @property
    def results(self) -> int:
        """Elements of the result: each model's rows, their positions, the layer's outputs."""
        positions = torch.Size(self.x[1:] if self.is_convolution else self.x[:-1]).numel()
        return self.total * (1 if self.rows else self.models) * positions * self.weight[0]

    @property
    def weights(self) -> int:
        """Elements of the base weight and of all deltas."""
        outputs, inputs = self.weight[0], torch.Size(self.weight[1:]).numel()
        delta = outputs * inputs if self.rank is None else self.rank * (outputs + inputs)
        return outputs * inputs + self.models * delta

    def __str__(self) -> str:
        form = "dense" if self.rank is None else f"rank {self.rank}"
        sharing = f"{self.rows} rows a model" if self.rows else f"{self.shared} shared rows"
        return f"{'x'.join(map(str, self.x))} to {self.weight[0]} K={self.models} {form}, {sharing}"

    def small(self) -> Layer:
        """What takes the same way through the code in a moment."""
        x, weight = ((3, 4, 4), (5, 3, *self.weight[2:])) if self.is_convolution else ((2, 8), (5, 8))
        return replace(self, rows=min(self.rows, 2), x=x, weight=weight, rank=self.rank and 3, models=2, shared=2)

    def inputs(self) -> Inputs:
        x, weight = torch.randn(self.total, *self.x, dtype=DTYPE), torch.randn(*self.weight, dtype=DTYPE)
        if self.rank is None:
            options = {"delta": 0.01 * torch.randn(self.models, *self.weight, dtype=DTYPE)}
        else:
            options = {
                "up": torch.randn(self.models, self.weight[0], self.rank, dtype=DTYPE),
                "down": 0.01 * torch.randn(self.models, self.rank, *self.weight[1:], dtype=DTYPE),
            }
        if self.rows:
            options["offsets"] = torch.arange(self.models + 1) * self.rows
        return x.to(memory_format=torch.channels_last) if self.is_convolution else x, weight, options


def _branch(hidden: Tensor, up: Tensor) -> Tensor:
    return F.conv2d(hidden, up[:, :, None, None]) if hidden.dim() == 4 else F.linear(hidden, up)


def _case(layer: Layer, quick: bool) -> Case:
    moved = DTYPE.itemsize * (layer.total * torch.Size(layer.x).numel() + layer.weights + layer.results)
    number = rotating_sets(moved, quick, default_device())
    sets = [layer.inputs() for _ in range(number)]
    if layer.is_convolution:
        name, padding = "delta_conv2d", layer.weight[-1] // 2
        fused, plain = partial(delta_conv2d, padding=padding), partial(F.conv2d, padding=padding)
    else:
        name, fused, plain = "delta_linear", partial(delta_linear), partial(F.linear)

    def run(backend: str, number: int) -> Tensor:
        x, weight, options = sets[number]
        return fused(x, weight, **options, backend=backend)

    def loop(number: int) -> Tensor:
        """As by hand, where the host knows which rows are whose: nothing waits for the device."""
        x, weight, options = sets[number]
        parts = x.split(layer.rows) if layer.rows else [x] * layer.models
        if layer.rank is None:
            return torch.cat([plain(part, weight + delta) for part, delta in zip(parts, options["delta"], strict=True)])
        pairs = zip(parts, options["up"], options["down"], strict=True)
        return torch.cat([plain(part, weight) + _branch(plain(part, down), up) for part, up, down in pairs])

    return Case(
        op=name,
        shapes=str(layer),
        dtype=dtype_name(DTYPE),
        bytes=moved,
        input_sets=number,
        rival=Contender("eager loop", architecture(), loop),
        contenders=[
            # What no delta op can beat where each model has its own rows.
            Contender("base alone", architecture(), lambda number: plain(*sets[number][:2])),
            *kernels(name, run),
        ],
        flop=2 * layer.results * torch.Size(layer.weight[1:]).numel(),
    )


def _cases(quick: bool) -> list[Callable[[], Case]]:
    """A CIFAR UNet's convolutions, with few rows a model; its first one, with shared rows; and attention's products."""
    table = [
        Layer(rows, (256, side, side), (256, 256, 3, 3), rank)
        for side, rows, rank in (
            (16, 1, None),
            (16, 4, None),
            (16, 16, None),
            (8, 4, None),
            (4, 1, None),
            (4, 16, None),
            (16, 4, 16),
            (8, 16, 16),
        )
    ]
    table.append(Layer(0, (3, 32, 32), (128, 3, 3, 3), None))
    table += [Layer(rows, (256, 320), (320, 320), rank) for rows, rank in ((1, None), (4, None), (4, 16), (16, 4))]
    if quick:
        table = list(dict.fromkeys(layer.small() for layer in table))
    return [partial(_case, layer, quick) for layer in table]


BENCHMARK = Benchmark("gpu_delta_ops", _cases, ("tests/test_delta_*.py",), device="cuda")
