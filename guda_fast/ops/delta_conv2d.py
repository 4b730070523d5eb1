"""The op `delta_conv2d`: one convolution of many models at once, base and deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from guda_fast import _backends
from guda_fast import reference as definition
from guda_fast._validate import check_int, check_tensor, describe
from guda_fast.ops import _library
from guda_fast.ops._deltas import DTYPES, Arguments, Request, backends, check_shapes, check_values, tf32_allowed
from guda_fast.reference.delta_conv2d import Window, empty_output

_NAME = "delta_conv2d"
_MOST = 2**15  # of a stride, a padding or a dilation: products of two with an image's size stay far from 2**63


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
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    backend: str = "auto",
) -> Tensor:
    """One convolution of M models in one call: the base layer, and each row's own delta on top.

    out[r] = x[r] * (weight + delta[k] + up[k] down[k]) + bias + bias_delta[k],  k = delta_index[model of row r]
    Without offsets every model takes all rows: out[m, r] is the same with k = delta_index[m].
    A dense delta is added to the weight first and rounded once to its dtype, as `DeltaBank.apply` does; low-rank deltas
    stay factors: a convolution to r channels, then a product from r to O. In float32 and float64 the reference does
    what is faster: the sum, or a convolution for each part.

    x: the rows, any strides [(R, C, H, W), float32, bfloat16, float16 or float64]
    weight, bias: the base layer, of one group [(O, C, KH, KW) and (O,), x's dtype]
    offsets: where the models' segments of rows begin, and where the last ends; from 0 to R, never falling, equal
        where a segment is empty; None where all models share the rows [(M + 1,), int64]
    delta: dense deltas [(K, O, C, KH, KW), x's dtype]
    up, down: instead, low-rank deltas of any rank r from 1; a scale is the caller's to multiply in, and different
        ranks are filled up with zeros [(K, O, r) and (K, r, C, KH, KW), x's dtype]
    bias_delta: deltas of the bias, with or without one of weights [(K, O), x's dtype]
    delta_index: which delta each model takes, -1 for none: the base; None is model m with delta m
        [(M,), int64, -1..K-1]
    stride, padding, dilation: as in torch.nn.functional.conv2d; zeros are padded [int or (height, width)]
    backend: "auto" or a name, see `explain`

    The values of offsets and delta_index are checked on the CPU; elsewhere that would synchronise, and they are
    the caller's duty. float32 products are as exact as `torch.backends.cudnn.conv` says.

    Returns a new tensor, channels-last where x is (and is not contiguous too)
    [(R, O, P, Q), or (M, R, O, P, Q) without offsets]. It carries no gradient.
    Raises TypeError or ValueError naming the argument; BackendUnavailableError where a named backend cannot.
    Source: Hu et al. 2021 (LoRA), equation 3, for the low-rank form.

    >>> x, weight, delta = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), -torch.ones(1, 1, 1, 3, 3)
    >>> delta_conv2d(x, weight, delta=delta, delta_index=torch.tensor([-1, 0])).flatten()
    tensor([9., 0.])
    """
    tensors = Arguments(x, weight, bias, offsets, delta, up, down, bias_delta, delta_index)
    if _library.is_recorded():
        with torch.no_grad():
            node: Tensor = _NODE(*tensors, *_window(stride, padding, dilation), backend)
            return node
    return _OP.run(_request(*tensors, stride=stride, padding=padding, dilation=dilation), backend)


def _request(*arguments: Any, stride: object = 1, padding: object = 0, dilation: object = 1, **named: Any) -> Request:
    request = _shapes(Arguments(*arguments, **named), _window(stride, padding, dilation))
    check_values(_NAME, request.tensors)
    return request


def _shapes(tensors: Arguments, window: Window) -> Request:
    """All of the validation that reads no values."""
    x = check_tensor(_NAME, "x", tensors.x, shape=(None,) * 4, dtypes=DTYPES)
    layer = (None, x.shape[1], None, None)
    weight = check_tensor(_NAME, "weight", tensors.weight, shape=layer, dtypes=(x.dtype,), device=x.device)
    if weight.numel() == 0:
        raise ValueError(f"{_NAME}: weight must have elements, got {describe(weight)}")
    request = Request(tensors, check_shapes(_NAME, tensors), window)
    if min(window.output_size(x, weight)) < 1:
        raise ValueError(
            f"{_NAME}: x must be at least as large as the window with its padding, got {describe(x)} "
            f"for a weight of shape {tuple(weight.shape)}"
        )
    return request


def _window(stride: object, padding: object, dilation: object) -> Window:
    """The three as pairs of (height, width)."""
    return Window(_pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1))


def _pair(name: str, value: object, low: int) -> tuple[int, int]:
    if not isinstance(value, list | tuple):
        both = check_int(_NAME, name, value, low, _MOST)
        return both, both
    if len(value) != 2:
        raise ValueError(f"{_NAME}: {name} must be an integer or two, got {describe(value)}")
    return check_int(_NAME, name, value[0], low, _MOST), check_int(_NAME, name, value[1], low, _MOST)


def _empty_output(request: Request) -> Tensor:
    models = request.models if request.tensors.offsets is None else None
    return empty_output(request.tensors.x, request.tensors.weight, request.window, models)


def _run_reference(request: Request) -> Tensor:
    return definition.delta_conv2d(**request.tensors._asdict(), window=request.window)


def _run_triton(request: Request) -> Tensor:
    from guda_fast.kernels.triton.delta_conv2d import delta_conv2d as launch

    out = _empty_output(request)
    tf32 = tf32_allowed(getattr(torch.backends.cudnn, "conv", torch.backends.cudnn))
    launch(out, *request.tensors, *request.window, models=request.models, tf32=tf32)
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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> Tensor:
    tensors = Arguments(x, weight, bias, offsets, delta, up, down, bias_delta, delta_index)
    return _OP.run(_request(*tensors, stride=stride, padding=padding, dilation=dilation), backend)


def _fake(*arguments: Any) -> Tensor:
    return _empty_output(_shapes(Arguments(*arguments[:-4]), _window(*arguments[-4:-1])))


_OP = _backends.register(_backends.Op(_NAME, _request, backends(_run_reference, _run_triton), delta_conv2d))
_NODE = _library.register(_NAME, _registered, _fake)
