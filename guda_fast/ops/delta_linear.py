"""The op `delta_linear`: one linear layer of many models at once, base and deltas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guda_fast import _backends
from guda_fast import reference as definition
from guda_fast._validate import check_tensor
from guda_fast.ops import _library
from guda_fast.ops._deltas import DTYPES, Arguments, Request, backends, check_shapes, check_values, tf32_allowed

_NAME = "delta_linear"


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
    A dense delta is added to the weight first and rounded once to its dtype, as `DeltaBank.apply` does; low-rank deltas
    stay factors. In float32 and float64 the reference does what is faster: the sum, or a product for each part.

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
    the caller's duty. float32 products are as exact as `torch.backends.cuda.matmul` says.

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
    tensors = Arguments(x, weight, bias, offsets, delta, up, down, bias_delta, delta_index)
    if _library.is_recorded():
        with torch.no_grad():
            node: Tensor = _NODE(*tensors, backend)
            return node
    return _OP.run(_request(*tensors), backend)


def _request(*arguments: Any, **named: Any) -> Request:
    request = _shapes(Arguments(*arguments, **named))
    check_values(_NAME, request.tensors)
    return request


def _shapes(tensors: Arguments) -> Request:
    """All of the validation that reads no values."""
    x = check_tensor(_NAME, "x", tensors.x, min_dim=2, dtypes=DTYPES)
    check_tensor(_NAME, "weight", tensors.weight, shape=(None, x.shape[-1]), dtypes=(x.dtype,), device=x.device)
    return Request(tensors, check_shapes(_NAME, tensors))


def _empty_output(request: Request) -> Tensor:
    x, weight, offsets = request.tensors.x, request.tensors.weight, request.tensors.offsets
    models = (request.models,) if offsets is None else ()
    return x.new_empty(*models, *x.shape[:-1], weight.shape[0])


def _run_reference(request: Request) -> Tensor:
    return definition.delta_linear(**request.tensors._asdict())


def _run_triton(request: Request) -> Tensor:
    from guda_fast.kernels.triton.delta_linear import delta_linear as launch

    out = _empty_output(request)
    launch(out, *request.tensors, models=request.models, tf32=tf32_allowed(torch.backends.cuda.matmul))
    return out


def _registered(
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
    tensors = Arguments(x, weight, bias, offsets, delta, up, down, bias_delta, delta_index)
    return _OP.run(_request(*tensors), backend)


def _fake(*arguments: Any) -> Tensor:
    return _empty_output(_shapes(Arguments(*arguments[:-1])))


_OP = _backends.register(_backends.Op(_NAME, _request, backends(_run_reference, _run_triton), delta_linear))
_NODE = _library.register(_NAME, _registered, _fake)
