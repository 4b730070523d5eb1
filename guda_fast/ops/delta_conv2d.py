"""The op `delta_conv2d`: one convolution of many models at once, base and deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guda_fast import _backends
from guda_fast import reference as definition
from guda_fast._validate import check_int, check_tensor, describe
from guda_fast.ops._deltas import (
    DTYPES,
    check_bias,
    check_deltas,
    check_segment_values,
    check_segments,
    triton_reason,
)
from guda_fast.reference.delta_conv2d import Window, output_format
from guda_fast.reference.segments import Deltas

_NAME = "delta_conv2d"


@dataclass(frozen=True)
class _Request:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    offsets: Tensor | None
    deltas: Deltas
    delta_index: Tensor | None
    models: int
    window: Window

    @property
    def device(self) -> torch.device:
        return self.x.device

    def empty_output(self) -> Tensor:
        height, width = self.window.output_size(_image(self.x), _image(self.weight))
        models = 1 if self.offsets is not None else self.models
        shape = (models * self.x.shape[0], self.weight.shape[0], height, width)
        out = torch.empty(shape, dtype=self.x.dtype, device=self.device, memory_format=output_format(self.x))
        return out if self.offsets is not None else out.unflatten(0, (models, self.x.shape[0]))


def _image(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[-2], tensor.shape[-1]


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
    A dense delta is added to the weight first and rounded once to its dtype, as `DeltaBank.apply` does; low-rank
    deltas stay factors: a convolution to r channels, then a product from r to O.

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
    the caller's duty. float32 products are as exact as `torch.backends.cudnn.allow_tf32` says.

    Returns a new tensor, channels-last where x is (and is not contiguous too)
    [(R, O, P, Q), or (M, R, O, P, Q) without offsets]. It carries no gradient.
    Raises TypeError or ValueError naming the argument; BackendUnavailableError where a named backend cannot.
    Source: Hu et al. 2021 (LoRA), equation 3, for the low-rank form.

    >>> x, weight, delta = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), -torch.ones(1, 1, 1, 3, 3)
    >>> delta_conv2d(x, weight, delta=delta, delta_index=torch.tensor([-1, 0])).flatten()
    tensor([9., 0.])
    """
    if torch.compiler.is_compiling():
        window = check_window(stride, padding, dilation)
        with torch.no_grad():
            node: Tensor = _library_op(
                x, weight, bias, offsets, delta, up, down, bias_delta, delta_index, *window, backend
            )
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
        stride=stride,
        padding=padding,
        dilation=dilation,
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
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> _Request:
    window = check_window(stride, padding, dilation)
    request = _shapes(x, weight, bias, offsets, delta, up, down, bias_delta, delta_index, window)
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
    window: Window,
) -> _Request:
    """All of the validation that reads no values."""
    check_tensor(_NAME, "x", x, shape=(None,) * 4, dtypes=DTYPES)
    check_tensor(_NAME, "weight", weight, shape=(None, x.shape[1], None, None), dtypes=(x.dtype,), device=x.device)
    check_bias(_NAME, bias, weight)
    deltas = check_deltas(_NAME, weight, delta, up, down, bias_delta)
    models = check_segments(_NAME, deltas, offsets, delta_index, x.device)
    if min(window.output_size(_image(x), _image(weight))) < 1:
        raise ValueError(
            f"{_NAME}: x must be at least as large as the window with its padding, got {describe(x)} "
            f"for a weight of shape {tuple(weight.shape)}"
        )
    return _Request(x, weight, bias, offsets, deltas, delta_index, models, window)


def check_window(stride: object, padding: object, dilation: object) -> Window:
    """The three as pairs of (height, width)."""
    return Window(_pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1))


def _pair(name: str, value: object, low: int) -> tuple[int, int]:
    if not isinstance(value, list | tuple):
        both = check_int(_NAME, name, value, low)
        return both, both
    if len(value) != 2:
        raise ValueError(f"{_NAME}: {name} must be an integer or two, got {describe(value)}")
    return check_int(_NAME, name, value[0], low), check_int(_NAME, name, value[1], low)


def _run_reference(request: _Request) -> Tensor:
    delta, up, down, bias_delta = request.deltas
    return definition.delta_conv2d(
        request.x,
        request.weight,
        request.bias,
        offsets=request.offsets,
        delta=delta,
        up=up,
        down=down,
        bias_delta=bias_delta,
        delta_index=request.delta_index,
        window=request.window,
    )


def _run_triton(request: _Request) -> Tensor:
    from guda_fast.kernels.triton.delta_conv2d import delta_conv2d as launch

    out = request.empty_output()
    launch(
        out,
        request.x,
        request.weight,
        request.bias,
        request.offsets,
        *request.deltas,
        request.delta_index,
        *request.window,
        models=request.models,
        tf32=torch.backends.cudnn.allow_tf32,
    )
    return out


def _triton_supports(request: _Request) -> str | None:
    return triton_reason(request.x, request.weight, request.bias, *request.deltas)


# Under torch.compile alone: a custom op costs an eager call about 15 us.
@torch.library.custom_op(
    "guda_fast::delta_conv2d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? offsets, Tensor? delta, Tensor? up, Tensor? down, "
    "Tensor? bias_delta, Tensor? delta_index, int[] stride, int[] padding, int[] dilation, str backend) -> Tensor",
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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> Tensor:
    window = check_window(stride, padding, dilation)
    request = _shapes(x, weight, bias, offsets, delta, up, down, bias_delta, delta_index, window)
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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> Tensor:
    window = check_window(stride, padding, dilation)
    return _shapes(x, weight, bias, offsets, delta, up, down, bias_delta, delta_index, window).empty_output()


_REFERENCE = _backends.Backend("reference", _run_reference)
_TRITON = _backends.Backend("triton", _run_triton, _triton_supports, _backends.triton_unavailable)
_OP = _backends.register(
    _backends.Op(_NAME, _request, {"cuda": (_TRITON, _REFERENCE), "cpu": (_REFERENCE, _TRITON), "*": (_REFERENCE,)})
)
