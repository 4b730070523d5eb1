"""Layers of one frozen base with the low-rank factors of several models: the delta ops, with gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

from guda_fast.ops.delta_conv2d import delta_conv2d
from guda_fast.ops.delta_linear import delta_linear
from guda_fast.reference.delta_conv2d import Window

# On a CPU a convolution to as few channels as a rank costs as much as one to many more. Measured with rank 4, 3x3
# windows and 16 to 128 rows, the gradient of the whole weight takes 0.4 to 1 times as long for 32 and 64 outputs, and
# 1.4 to 1.5 times for 256.
_FEW_OUTPUTS = 128
Block = tuple[slice, slice]
"""Neighbouring models with equally many rows, and these rows."""


class Segments(NamedTuple):
    """The rows of one model after another.

    sizes: how many each model has [M, >= 0]. offsets: where they begin, and where the last end
    [(M + 1,), int64, on the rows' device].
    """

    sizes: tuple[int, ...]
    offsets: Tensor

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> Segments:
        return cls(tuple(sizes), torch.tensor([0, *accumulate(sizes)], device=device))

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    def slices(self) -> Iterator[slice]:
        """The rows of each model."""
        return (slice(end - size, end) for size, end in zip(self.sizes, accumulate(self.sizes), strict=True))

    def blocks(self, together: bool = True) -> Iterator[Block]:
        """All models at once where they have equally many rows and may be ``together``, each on its own otherwise."""
        if together and len(set(self.sizes)) == 1:
            yield slice(0, len(self.sizes)), slice(0, self.rows)
            return
        for model, rows in enumerate(self.slices()):
            yield slice(model, model + 1), rows


class _Linear(torch.autograd.Function):
    """`delta_linear` with gradients for the rows and the factors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor, segments: Segments
    ) -> Tensor:
        ctx.save_for_backward(x, weight, up, down)
        ctx.segments = segments
        return delta_linear(x, weight, bias, offsets=segments.offsets, up=up, down=down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dx is the op with all factors transposed; dL/dB = g^T (x A^T), dL/dA = (g B)^T x over a model's rows."""
        x, weight, up, down = ctx.saved_tensors
        segments: Segments = ctx.segments
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = delta_linear(grad, weight.mT, offsets=segments.offsets, up=down.mT, down=up.mT)
        grad_up, grad_down = torch.empty_like(up), torch.empty_like(down)
        for models, rows in segments.blocks():
            own_x, own_grad = (_by_model(tensor[rows], models).flatten(1, -2) for tensor in (x, grad))
            grad_up[models] = own_grad.mT @ (own_x @ down[models].mT)
            grad_down[models] = (own_grad @ up[models]).mT @ own_x
        return grad_x, None, None, grad_up, grad_down, None


class _Conv2d(torch.autograd.Function):
    """`delta_conv2d` with gradients for the rows and the factors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor,
        segments: Segments,
        window: Window,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, up, down)
        ctx.segments, ctx.window = segments, window
        return delta_conv2d(x, weight, bias, offsets=segments.offsets, up=up, down=down, **window._asdict())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down = ctx.saved_tensors
        given = _ConvStep(x, weight, up, down, grad, ctx.segments, ctx.window, bool(ctx.needs_input_grad[0]))
        on_cpu = x.device.type == "cpu"
        if on_cpu and weight.dtype.itemsize >= 4 and len(weight) <= _FEW_OUTPUTS:
            grad_x, grad_up, grad_down = merged_gradients(given)
        else:
            grad_x, grad_up, grad_down = branch_gradients(given, together=not on_cpu)
        return grad_x, None, None, grad_up, grad_down, None, None


class _ConvStep(NamedTuple):
    """What the gradients of a convolution are made of."""

    x: Tensor
    weight: Tensor
    up: Tensor
    down: Tensor
    grad: Tensor
    segments: Segments
    window: Window
    of_x: bool


Gradients = tuple[Tensor | None, Tensor, Tensor]
"""For x, up and down."""


def merged_gradients(step: _ConvStep) -> Gradients:
    """Through the weight W + B A of each model: dL/dB = dL/dW A^T, dL/dA = B^T dL/dW."""
    x, weight, up, down, grad, segments, window, of_x = step
    grad_x = torch.empty_like(x) if of_x else None
    grad_up, grad_down = torch.empty_like(up), torch.empty_like(down)
    for model, rows in enumerate(segments.slices()):
        of_weight = conv2d_weight(x[rows], weight.shape, grad[rows], *window).flatten(1)
        grad_up[model] = of_weight @ down[model].flatten(1).T
        grad_down[model] = (up[model].T @ of_weight).view_as(down[model])
        if grad_x is not None:
            merged = weight + torch.tensordot(up[model], down[model], dims=1)
            grad_x[rows] = conv2d_input(x[rows].shape, merged, grad[rows], *window)
    return grad_x, grad_up, grad_down


def branch_gradients(step: _ConvStep, *, together: bool) -> Gradients:
    """Through h = A * x and B h beside the base; the branches of a block are the groups of one convolution.

    together: whether models with equally many rows are one block
    """
    x, weight, up, down, grad, segments, window, of_x = step
    grad_x = conv2d_input(x.shape, weight, grad, *window) if of_x else None
    grad_up, grad_down = torch.empty_like(up), torch.empty_like(down)
    for models, rows in segments.blocks(together):
        groups = models.stop - models.start
        own_x, own_grad = (_side_by_side(tensor[rows], models) for tensor in (x, grad))
        own_down, own_up = down[models].flatten(0, 1), up[models].mT.flatten(0, 1)[..., None, None]
        hidden = F.conv2d(own_x, own_down, None, *window, groups=groups)
        grad_hidden = F.conv2d(own_grad, own_up, groups=groups)
        pixels = (tensor.unflatten(1, (groups, -1)).flatten(3) for tensor in (own_grad, hidden))
        grad_up[models] = torch.einsum("nmop,nmrp->mor", *pixels)
        of_down = conv2d_weight(own_x, own_down.shape, grad_hidden, *window, groups)
        grad_down[models] = of_down.unflatten(0, (groups, -1))
        if grad_x is not None:
            of_branch = conv2d_input(own_x.shape, own_down, grad_hidden, *window, groups)
            grad_x[rows] += of_branch.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
    return grad_x, grad_up, grad_down


def _by_model(tensor: Tensor, models: slice) -> Tensor:
    """The rows of equally many for each model [(M, n, ...)]."""
    count = models.stop - models.start
    result: Tensor = tensor.unflatten(0, (count, len(tensor) // count))
    return result


def _side_by_side(tensor: Tensor, models: slice) -> Tensor:
    """The channels of all models' first rows, then of their second ones and so on [(n, M C, H, W)]."""
    return _by_model(tensor, models).transpose(0, 1).flatten(1, 2)


class Factors(NamedTuple):
    """What one model adds to a weight (O, *I): s up down.

    up: [(O, r)]. down: [(r, *I)], both float32, or float64 for a weight of it. The scale s is not in them.
    """

    up: Tensor
    down: Tensor


def takes_factors(module: nn.Module) -> bool:
    """Whether the delta ops compute this layer: Linear, and Conv2d of one group that is padded with zeros."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


class FactoredLayer(nn.Module):
    """A layer of the base for the rows of several models, each with its own factors.

    out[r] = base(x[r]) + scale up[k] (down[k] x[r]),  k = the model of row r

    name: of the layer, for messages. base: see `takes_factors`; not copied. scale: alpha / rank.
    """

    def __init__(self, name: str, base: nn.Linear | nn.Conv2d, scale: float) -> None:
        super().__init__()
        self.name, self.base, self.scale = name, base, scale
        self._factors: Sequence[Factors] = ()
        self._segments: Segments | None = None

    def expect(self, factors: Sequence[Factors], segments: Segments) -> None:
        """Say whose rows come next: a model for each segment."""
        self._factors, self._segments = factors, segments

    def forward(self, x: Tensor) -> Tensor:
        segments = self._segments
        if segments is None or len(x) != segments.rows:
            wanted = 0 if segments is None else segments.rows
            raise ValueError(
                f"LoraStudents: layer {self.name!r} must get one row for each of the {wanted} images of a step, "
                f"got {len(x)}; choose other layers"
            )
        dtype = _computed_in(self.base.weight)
        up = self.scale * torch.stack([factors.up for factors in self._factors])
        down = torch.stack([factors.down for factors in self._factors])
        x, weight, up, down = (tensor.to(dtype) for tensor in (x, self.base.weight, up, down))
        bias = None if self.base.bias is None else self.base.bias.to(dtype)
        if isinstance(self.base, nn.Linear):
            return _applied(_Linear, x, weight, bias, up, down, segments)
        window = Window(*(_pair(getattr(self.base, name)) for name in Window._fields))
        return _applied(_Conv2d, x, weight, bias, up, down, segments, window)

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"LoraStudents: layer {self.name!r} must be called by its network, got one that reads its {name}; "
                "choose other layers"
            )
        return super().__getattr__(name)


def _applied(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)
    return result


def _computed_in(weight: Tensor) -> torch.dtype:
    """What torch.autocast makes of a layer with this weight, as it does with torch's own."""
    device = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


def _pair(value: Any) -> tuple[int, int]:
    height, width = value
    return int(height), int(width)
