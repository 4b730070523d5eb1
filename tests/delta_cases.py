"""Layers with deltas for the tests of `delta_linear` and `delta_conv2d`, and their values in plain float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guda_fast import _backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the Triton backend runs in its interpreter
OFFSETS = torch.tensor([0, 0, 3, 3, 4, 9, 9])  # six models: three empty, one at each end
INDEX = torch.tensor([2, 0, 1, -1, 2, 0])  # over three deltas
FORMS = ["dense", "rank 1", "rank 3", "rank 19", "bias"]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# The tolerances are those of float32; torch's default rounds what a GPU's convolutions multiply to TF32.
torch.backends.cudnn.allow_tf32 = DEVICE == "cpu"


def here(tensor: Tensor | None) -> Tensor | None:
    """On the device that the tests run on."""
    return None if tensor is None else tensor.to(DEVICE)


BACKENDS = ["reference"] if _backends.triton_unavailable() else ["reference", "triton"]


@dataclass(frozen=True)
class Layer:
    """Arguments of an op. ``apply`` is the layer of one model, such as torch.nn.functional.linear."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    deltas: dict[str, Tensor]
    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def of_delta(self, k: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with delta k (-1: none), in the dtype of the layer."""
        weight, bias = self.weight, self.bias
        if k < 0:
            return weight, bias
        if "delta" in self.deltas:
            weight = weight + self.deltas["delta"][k]
        if "up" in self.deltas:
            weight = weight + torch.tensordot(self.deltas["up"][k], self.deltas["down"][k], dims=1)
        if "bias_delta" in self.deltas:
            bias = self.deltas["bias_delta"][k] + (0 if bias is None else bias)
        return weight, bias

    def map(self, change: Callable[[Tensor], Tensor]) -> Layer:
        deltas = {name: change(tensor) for name, tensor in self.deltas.items()}
        bias = None if self.bias is None else change(self.bias)
        return Layer(change(self.x), change(self.weight), bias, deltas, self.apply)

    def row_by_row(self, offsets: Tensor | None, index: Tensor) -> Tensor:
        """Each row through its own model's layer, one after another; one model after another without offsets."""
        models = [self.of_delta(int(k)) for k in index]
        if offsets is None:
            return torch.stack([self.apply(self.x, *model) for model in models])
        owners = [m for m in range(len(index)) for _ in range(int(offsets[m]), int(offsets[m + 1]))]
        return torch.cat([self.apply(row[None], *models[m]) for row, m in zip(self.x, owners, strict=True)])

    def check(self, result: Tensor, offsets: Tensor | None, index: Tensor) -> None:
        """A sum of n products in float32, and at most five roundings to the dtype: of the summed weight or the
        low-rank product, the base product, its sum with the delta's, and with the bias's."""
        exact = self.map(Tensor.double).row_by_row(offsets, index)
        sizes = self.map(lambda tensor: tensor.double().abs()).row_by_row(offsets, index)
        terms = self.weight[0].numel() + 32
        bound = (5 * UNIT[self.x.dtype] + 2 * terms * 2.0**-24) * sizes
        assert result.dtype == self.x.dtype
        assert result.shape == exact.shape
        assert ((result.double() - exact).abs() <= bound).all()
        eager = self.row_by_row(offsets, index)
        assert _rms(result.double() - exact) <= 2 * _rms(eager.double() - exact) + 2.0**-30 * _rms(exact)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def random_layer(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    form: str,
    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    number: int = 3,
) -> Layer:
    """Deltas as large as the weight, so that a wrong one shows."""
    random = torch.Generator().manual_seed(len(form) + sum(x_shape) + sum(weight_shape))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype).to(DEVICE)

    outputs = weight_shape[0]
    deltas: dict[str, Any] = {}
    if form == "dense":
        deltas["delta"] = normal(number, *weight_shape)
    elif form.startswith("rank"):
        rank = int(form.split()[1])
        deltas = {"up": normal(number, outputs, rank), "down": normal(number, rank, *weight_shape[1:])}
    if bias or form == "bias":
        deltas["bias_delta"] = normal(number, outputs)
    return Layer(normal(*x_shape), normal(*weight_shape), normal(outputs) if bias else None, deltas, apply)
