"""Definition of the op `delta_linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from guda_fast.reference.segments import Deltas, indices, segments

# Below so many rows a model, making the sum of weight and delta costs more than a second product.
MERGE_ROWS = 16


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
    row_size = x.shape[1:-1].numel()
    flat = x.reshape(x.shape[0] * row_size, x.shape[-1])
    if offsets is None:
        shared = _shared_input(flat, weight, bias, deltas, index)
        return shared.view(len(index), *x.shape[:-1], weight.shape[0])
    out = flat.new_empty(flat.shape[0], weight.shape[0])
    parts = segments(offsets, index, row_size)
    if deltas.dense is not None and (dtype.itemsize < 4 or flat.shape[0] >= MERGE_ROWS * len(index)):
        for rows, k in parts:
            _affine(flat[rows], *deltas.merged(weight, bias, k), out=out[rows])
    else:
        _affine(flat, weight, bias, out=out)
        for rows, k in parts:
            if k >= 0:
                _add_delta(out[rows], flat[rows], deltas, k)
    return out.view(*x.shape[:-1], weight.shape[0])


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


def _shared_input(x: Tensor, weight: Tensor, bias: Tensor | None, deltas: Deltas, index: list[int]) -> Tensor:
    """Every model on the same rows [(M, rows, O)]: one product for all that depends on x alone."""
    rows, outputs = x.shape[0], weight.shape[0]
    if not index:
        return x.new_empty(0, rows, outputs)
    if deltas.dense is not None:
        together = F.linear(x, *deltas.stacked(weight, bias, index))
        return together.view(rows, len(index), outputs).transpose(0, 1).contiguous()
    out = F.linear(x, weight, bias).expand(len(index), -1, -1).contiguous()
    hidden = None if deltas.down is None else F.linear(x, deltas.down.flatten(0, 1)).unflatten(1, deltas.down.shape[:2])
    for part, k in zip(out, index, strict=True):
        if k < 0:
            continue
        if hidden is not None and deltas.up is not None:
            part.addmm_(hidden[:, k], deltas.up[k].T)
        if deltas.bias is not None:
            part += deltas.bias[k]
    return out
