"""Definition of the op `delta_conv2d`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from guda_fast.reference.segments import Deltas, indices, segments


class Window(NamedTuple):
    """How a convolution's window moves, each (height, width)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def output_size(self, x: Tensor, weight: Tensor) -> tuple[int, int]:
        """Height and width of the result; zero or less where the window does not fit."""
        height, width = (
            (size + 2 * pad - spread * (taps - 1) - 1) // step + 1
            for size, taps, step, pad, spread in zip(x.shape[2:], weight.shape[2:], *self, strict=True)
        )
        return height, width


def output_format(x: Tensor) -> torch.memory_format:
    """Channels-last where x is and is not contiguous too."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_output(x: Tensor, weight: Tensor, window: Window, models: int | None = None) -> Tensor:
    """Memory for the result [(R, O, P, Q), or (M, R, O, P, Q) where the models are given]."""
    rows = x.shape[0] if models is None else models * x.shape[0]
    shape = (rows, weight.shape[0], *window.output_size(x, weight))
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=output_format(x))
    if models is None:
        return out
    result: Tensor = out.unflatten(0, (models, x.shape[0]))
    return result


def delta_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    delta: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
    bias_delta: Tensor | None = None,
    delta_index: Tensor | None = None,
    window: Window = Window(),  # noqa: B008 - immutable
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Convolutions of many models; arguments as in `guda_fast.ops.delta_conv2d`, not checked here.

    out[r] = x[r] * (weight + delta[k] + up[k] down[k]) + bias + bias_delta[k],  k = delta_index[model of row r]

    dtype: of the computation; x's own by default, float64 for the exact value of other arguments

    Returns a new tensor [(R, O, P, Q), or (M, R, O, P, Q) without offsets; dtype; channels-last as x].
    """
    dtype = dtype or x.dtype
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    deltas = Deltas(delta, up, down, bias_delta).to(dtype)
    index = indices(delta_index, deltas)
    models = 1 if offsets is not None else len(index)  # that each row is computed for
    parts = segments(offsets, index, x.shape[0])
    height, width = window.output_size(x, weight)
    out = empty_output(x, weight, window, None if offsets is not None else models)
    flat = out if offsets is not None else out.flatten(0, 1)
    if deltas.merging_pays(weight, models * x.shape[0] * height * width // max(1, len(index))):
        for rows, to, k in parts:
            flat[to] = F.conv2d(x[rows], *deltas.merged(weight, bias, k), *window)
    else:
        out.copy_(F.conv2d(x, weight, bias, *window))
        for rows, to, k in parts:
            if k >= 0:
                _add_delta(flat[to], x[rows], deltas, k, window)
    return out


def _add_delta(out: Tensor, x: Tensor, deltas: Deltas, k: int, window: Window) -> None:
    bias = None if deltas.bias is None else deltas.bias[k]
    if deltas.dense is not None:
        out += F.conv2d(x, deltas.dense[k], bias, *window)
    elif deltas.up is not None and deltas.down is not None:
        hidden = F.conv2d(x, deltas.down[k], None, *window)
        out += F.conv2d(hidden, deltas.up[k][:, :, None, None], bias)
    elif bias is not None:
        out += bias[:, None, None]
