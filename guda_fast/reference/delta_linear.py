"""Definition of the op `delta_linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from guda_fast.reference.segments import Deltas, indices, segments


def delta_linear(
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
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Linear layers of many models; arguments as in `guda_fast.ops.delta_linear`, not checked here.

    out[r] = x[r] (weight + delta[k] + up[k] down[k])^T + bias + bias_delta[k],  k = delta_index[model of row r]

    dtype: of the computation; x's own by default, float64 for the exact value of other arguments

    Returns a new tensor [(R, *T, O), or (M, R, *T, O) without offsets; dtype].
    """
    dtype = dtype or x.dtype
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    deltas = Deltas(delta, up, down, bias_delta).to(dtype)
    index = indices(delta_index, deltas)
    tokens = x.shape[1:-1].numel()
    flat = x.reshape(x.shape[0] * tokens, x.shape[-1])
    models = 1 if offsets is not None else len(index)  # that each row is computed for
    parts = segments(offsets, index, x.shape[0], tokens)
    if deltas.merging_pays(weight, models * flat.shape[0] // max(1, len(index))):
        out = flat.new_empty(models * flat.shape[0], weight.shape[0])
        for rows, to, k in parts:
            _affine(flat[rows], *deltas.merged(weight, bias, k), out=out[to])
    else:
        base = F.linear(flat, weight, bias)
        out = base if offsets is not None else base.repeat(models, 1)
        for rows, to, k in parts:
            if k >= 0:
                _add_delta(out[to], flat[rows], deltas, k)
    shape = x.shape[:-1] if offsets is not None else (len(index), *x.shape[:-1])
    return out.view(*shape, weight.shape[0])


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def _add_delta(out: Tensor, x: Tensor, deltas: Deltas, k: int) -> None:
    if deltas.dense is not None:
        out.addmm_(x, deltas.dense[k].T)
    if deltas.up is not None and deltas.down is not None:
        out.addmm_(x @ deltas.down[k].T, deltas.up[k].T)
    if deltas.bias is not None:
        out += deltas.bias[k]
