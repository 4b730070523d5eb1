"""The op `delta_linear`: one linear layer of many models at once, base and deltas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from guda_fast import _backends
from guda_fast import reference as definition
from guda_fast._validate import check_tensor
from guda_fast.ops._deltas import (
    DTYPES,
    check_bias,
    check_deltas,
    check_segment_values,
    check_segments,
    triton_reason,
)
from guda_fast.reference.segments import Deltas

_NAME = "delta_linear"


@dataclass(frozen=True)
class _Request:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    offsets: Tensor | None
    deltas: Deltas
    delta_index: Tensor | None
    models: int

    @property
    def device(self) -> torch.device:
        return self.x.device

    def empty_output(self) -> Tensor:
        models = () if self.offsets is not None else (self.models,)
        return self.x.new_empty(*models, *self.x.shape[:-1], self.weight.shape[0])


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
    backend: str = "auto",
) -> Tensor:
    """One linear layer of M models in one call: the base layer, and each row's own delta on top.

    out[r] = x[r] (weight + delta[k] + up[k] down[k])^T + bias + bias_delta[k],  k = delta_index[model of row r]
    Without offsets every model takes all rows: out[m, r] is the same with k = delta_index[m].
    A dense delta is added to the weight first and rounded once to its dtype, as `DeltaBank.apply` does (where a
    model has few float32 rows the reference adds two products instead); low-rank deltas stay factors.

    x: the rows, with token dimensions T or none, any strides [(R, *T, I), float32, bfloat16, float16 or float64]
    weight, bias: the base layer [(O, I) and (O,), x's dtype]
    offsets: where the models' segments of rows begin, and where the last ends; from 0 to R, never falling, equal
        where a segment is empty; None where all models share the rows [(M + 1,), int64]
    delta: dense deltas [(K, O, I), x's dtype]
    up, down: instead, low-rank deltas of any rank r from 1; a scale is the caller's to multiply in, and different
        ranks are filled up with zeros [(K, O, r) and (K, r, I), x's dtype]
    bias_delta: deltas of the bias, with or without one of weights [(K, O), x's dtype]
    delta_index: which delta each model takes, -1 for none: the base; None is model m with delta m
        [(M,), int64, -1..K-1]
    backend: "auto" or a name, see `explain`

    The values of offsets and delta_index are checked on the CPU; elsewhere that would synchronise, and they are
    the caller's duty. float32 products are as exact as `torch.backends.cuda.matmul.allow_tf32` says.

    Returns a new contiguous tensor [(R, *T, O), or (M, R, *T, O) without offsets]. It carries no gradient.
    Raises TypeError or ValueError naming the argument; BackendUnavailableError where a named backend cannot.
    Source: Hu et al. 2021 (LoRA), equation 3, for the low-rank form.

    >>> x, offsets = torch.ones(3, 2), torch.tensor([0, 1, 3])
    >>> up, down = torch.tensor([[[1.0]], [[2.0]]]), torch.ones(2, 1, 2)
    >>> delta_linear(x, torch.ones(1, 2), offsets=offsets, up=up, down=down)
    tensor([[4.],
            [6.],
            [6.]])
    """
    if torch.compiler.is_compiling():
        with torch.no_grad():
            node: Tensor = _library_op(x, weight, bias, offsets, delta, up, down, bias_delta, delta_index, backend)
            return node
    request = _request(
        x,
        weight,
        bias,
        offsets=offsets,
        delta=delta,
        up=up,
        down=down,
        bias_delta=bias_delta,
        delta_index=delta_index,
    )
    return _OP.run(request, backend)


def _request(
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
) -> _Request:
    request = _shapes(x, weight, bias, offsets, delta, up, down, bias_delta, delta_index)
    check_segment_values(_NAME, x.shape[0], request.deltas, offsets, delta_index)
    return request


def _shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    delta: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    bias_delta: Tensor | None,
    delta_index: Tensor | None,
) -> _Request:
    """All of the validation that reads no values."""
    check_tensor(_NAME, "x", x, min_dim=2, dtypes=DTYPES)
    check_tensor(_NAME, "weight", weight, shape=(None, x.shape[-1]), dtypes=(x.dtype,), device=x.device)
    check_bias(_NAME, bias, weight)
    deltas = check_deltas(_NAME, weight, delta, up, down, bias_delta)
    models = check_segments(_NAME, deltas, offsets, delta_index, x.device)
    return _Request(x, weight, bias, offsets, deltas, delta_index, models)


def _run_reference(request: _Request) -> Tensor:
    delta, up, down, bias_delta = request.deltas
    return definition.delta_linear(
        request.x,
        request.weight,
        request.bias,
        offsets=request.offsets,
        delta=delta,
        up=up,
        down=down,
        bias_delta=bias_delta,
        delta_index=request.delta_index,
    )


def _run_triton(request: _Request) -> Tensor:
    from guda_fast.kernels.triton.delta_linear import delta_linear as launch

    out = request.empty_output()
    launch(
        out,
        request.x,
        request.weight,
        request.bias,
        request.offsets,
        *request.deltas,
        request.delta_index,
        models=request.models,
        tf32=torch.backends.cuda.matmul.allow_tf32,
    )
    return out


def _triton_supports(request: _Request) -> str | None:
    return triton_reason(request.x, request.weight, request.bias, *request.deltas)


# Under torch.compile alone: a custom op costs an eager call about 15 us.
@torch.library.custom_op(
    "guda_fast::delta_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? offsets, Tensor? delta, Tensor? up, Tensor? down, "
    "Tensor? bias_delta, Tensor? delta_index, str backend) -> Tensor",
)
def _library_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    delta: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    bias_delta: Tensor | None,
    delta_index: Tensor | None,
    backend: str,
) -> Tensor:
    request = _shapes(x, weight, bias, offsets, delta, up, down, bias_delta, delta_index)
    check_segment_values(_NAME, x.shape[0], request.deltas, offsets, delta_index)
    return _OP.run(request, backend)


@_library_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    delta: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    bias_delta: Tensor | None,
    delta_index: Tensor | None,
    backend: str,
) -> Tensor:
    return _shapes(x, weight, bias, offsets, delta, up, down, bias_delta, delta_index).empty_output()


_REFERENCE = _backends.Backend("reference", _run_reference)
_TRITON = _backends.Backend("triton", _run_triton, _triton_supports, _backends.triton_unavailable)
_OP = _backends.register(
    _backends.Op(_NAME, _request, {"cuda": (_TRITON, _REFERENCE), "cpu": (_REFERENCE, _TRITON), "*": (_REFERENCE,)})
)
