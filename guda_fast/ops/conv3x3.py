"""The op `conv3x3`: the convolution that most of a UNet's time goes into."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from guda_fast import _backends
from guda_fast import reference as definition
from guda_fast._validate import check_tensor
from guda_fast.ops import _library
from guda_fast.ops._rows import native_reason
from guda_fast.reference.conv3x3 import layout_of

_NAME = "conv3x3"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Channels come in whole vectors and panels.
INPUT_STEP, OUTPUT_STEP = 16, 32
# Fewer tiles of 2x2 outputs do not pay for transforming the weight, nor, with one that no cache holds, for reading what
# that gives, which is larger by 16 / 9: with two threads, on which the measured break-even lies higher than on one.
_LEAST_TILES, _WEIGHTS_PER_TILE = 64, 2048


class _Request(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.x.device


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """3x3 convolution of stride 1 that keeps height and width, as in the residual blocks of UNets.

    out[b, o, i, j] = bias[o] + sum over c, u, v of weight[o, c, u, v] x[b, c, i + u - 1, j + v - 1], x being 0 outside

    `cpp` computes 2x2 outputs at a time from 16 products where the sum has 36, in float32.

    x: activations; `cpp` needs channels-last [(B, C, H, W), float32, bfloat16, float16 or float64]
    weight: quickest in channels-last [(O, C, 3, 3), x's dtype]
    bias: [(O,), x's dtype]
    backend: "auto" or a name, see `explain`

    Returns a new tensor in channels-last where x is, without gradient [(B, O, H, W), x's dtype].
    Raises TypeError or ValueError naming the argument; BackendUnavailableError where a named backend cannot.
    Source: Lavin and Gray 2015 (arXiv 1509.09308), F(2x2, 3x3).

    >>> conv3x3(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 3, 3)).flatten().tolist()
    [4.0, 6.0, 4.0, 4.0, 6.0, 4.0]
    """
    if _library.is_recorded():
        node: Tensor = _NODE(x.detach(), weight.detach(), None if bias is None else bias.detach(), backend)
        return node
    return _OP.run(_request(x, weight, bias), backend)


def _request(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Request:
    check_tensor(_NAME, "x", x, shape=(None,) * 4, dtypes=_DTYPES)
    check_tensor(_NAME, "weight", weight, shape=(None, x.shape[1], 3, 3), dtypes=(x.dtype,), device=x.device)
    if bias is not None:
        check_tensor(_NAME, "bias", bias, shape=weight.shape[:1], dtypes=(x.dtype,), device=x.device)
    return _Request(x, weight, bias)


def _run_reference(request: _Request) -> Tensor:
    return definition.conv3x3(*request)


def _run_torch(request: _Request) -> Tensor:
    x, weight, bias = request
    if x.numel() == 0 or weight.numel() == 0:  # Some of which PyTorch refuses.
        return _run_reference(request)
    return F.conv2d(x, weight, bias, padding=1).contiguous(memory_format=layout_of(x))


def _run_cpp(request: _Request) -> Tensor:
    from guda_fast import _C

    x, weight, bias = request
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    rows, inputs, height, width = x.shape
    out = _empty(x, weight)
    _C.conv3x3(
        out.data_ptr(),
        _strides(out),
        x.data_ptr(),
        _strides(x),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        rows,
        height,
        width,
        inputs,
        weight.shape[0],
        torch.get_num_threads(),
    )
    return out


def _strides(x: Tensor) -> tuple[int, int, int]:
    rows, _, height, width = x.stride()
    return rows, height, width


def _empty(x: Tensor, weight: Tensor) -> Tensor:
    rows, _, height, width = x.shape
    shape = (rows, weight.shape[0], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def _cpp_supports(request: _Request) -> str | None:
    x, weight, bias = request
    if x.dtype != torch.float32:
        return f"x is {str(x.dtype).removeprefix('torch.')}, and cpp computes in float32 here"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not in channels-last (to(memory_format=torch.channels_last) makes it so)"
    return native_reason(x=x, weight=weight, bias=bias) or _size_reason(x, weight)


def _size_reason(x: Tensor, weight: Tensor) -> str | None:
    """Why cpp cannot take these sizes, or does not pay, or None."""
    outputs, inputs = weight.shape[:2]
    if inputs % INPUT_STEP or outputs % OUTPUT_STEP:
        return (
            f"channels are {inputs} to {outputs}, and cpp takes multiples of {INPUT_STEP} to multiples of {OUTPUT_STEP}"
        )
    rows, _, height, width = x.shape
    tiles = rows * ((height + 1) // 2) * ((width + 1) // 2)
    least = max(_LEAST_TILES, inputs * outputs // _WEIGHTS_PER_TILE)
    if tiles < least:
        return f"{tiles} tiles of 2x2 are too few for what cpp does to the weight first, which pays from {least} on"
    return None


_REFERENCE = _backends.Backend("reference", _run_reference)
_TORCH = _backends.Backend("torch", _run_torch)
_CPP = _backends.Backend("cpp", _run_cpp, _cpp_supports, _backends.native_unavailable, _backends.native_detail)
_OTHERS = (_TORCH, _REFERENCE)
_OP = _backends.register(
    _backends.Op(_NAME, _request, {"cpu": (_CPP, *_OTHERS), "cuda": _OTHERS, "*": _OTHERS}, conv3x3)
)


def _registered(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return _OP.run(_request(x, weight, bias), backend)


def _fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return _empty(x, weight)


_NODE = _library.register(_NAME, _registered, _fake)
