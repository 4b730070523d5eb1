"""The op `group_norm_silu`: group norm with the addition, the affine map and the activation around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from guda_fast import _backends
from guda_fast import reference as definition
from guda_fast._validate import check_bool, check_index_range, check_int, check_real, check_tensor
from guda_fast.ops._rows import native_reason

_NAME = "group_norm_silu"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class _Request:
    x: Tensor
    groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    addend: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    silu: bool
    model_index: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.x.device


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    addend: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    model_index: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Group norm, with what stands before and after it in a diffusion model's residual block, in one pass.

    h = x + addend; n = (h - mean) / sqrt(variance + eps) over each row's group of channels and all positions
    y = (n weight + bias) (1 + scale) + shift; the result is y sigmoid(y), or y
    Computed in float32 (float64 for float64 x), and rounded to x's dtype once.

    x: activations; channels-last is the fast layout [(R, C, *S), float32, bfloat16, float16 or float64]
    groups: number of groups of neighbouring channels [divides C]
    weight, bias: affine parameters of one model, or of M [(C,), or (M, C) with model_index; float32 or x's dtype]
    eps: added to the variance [>= 0]
    addend: added to each position before the norm, such as a time embedding [(R, C), float32 or x's dtype]
    scale, shift: applied after the affine parameters [(R, C), float32 or x's dtype]
    silu: apply SiLU, y sigmoid(y), at the end
    model_index: which model's weight and bias each row takes [(R,), int64 in [0, M)]
    backend: "auto" or a name, see `explain`

    The index range is checked on the CPU; elsewhere that would synchronise, and it is the caller's duty.

    Returns a new tensor [shape, dtype and memory layout of x], without gradient.
    Raises TypeError or ValueError naming the argument; BackendUnavailableError where a named backend cannot.
    Source: Wu and He 2018 (arXiv 1803.08494); Elfwing et al. 2017 (arXiv 1702.03118).

    >>> group_norm_silu(torch.tensor([[[1.0, 3.0]]]), 1, eps=0.0, silu=False)
    tensor([[[-1.,  1.]]])
    """
    request = _request(
        x, groups, weight, bias, eps=eps, addend=addend, scale=scale, shift=shift, silu=silu, model_index=model_index
    )
    return _OP.run(request, backend)


def _request(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    addend: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    model_index: Tensor | None = None,
) -> _Request:
    check_tensor(_NAME, "x", x, min_dim=2, max_dim=5, dtypes=_DTYPES)
    rows, channels = x.shape[:2]
    groups = check_int(_NAME, "groups", groups, 1)
    if channels % groups:
        raise ValueError(f"{_NAME}: groups must divide the {channels} channels of x, got {groups}")
    dtypes = (torch.float32, x.dtype) if x.dtype.itemsize == 2 else (x.dtype,)
    affine = (channels,) if model_index is None else (None, channels)
    per_row = (rows, channels)
    vectors = {"weight": weight, "bias": bias, "addend": addend, "scale": scale, "shift": shift}
    for name, vector in vectors.items():
        if vector is not None:
            shape = affine if name in ("weight", "bias") else per_row
            check_tensor(_NAME, name, vector, shape=shape, dtypes=dtypes, device=x.device)
    if model_index is not None:
        check_tensor(_NAME, "model_index", model_index, shape=(rows,), dtypes=(torch.int64,), device=x.device)
        for parameter in (weight, bias):
            if parameter is not None:
                check_index_range(_NAME, "model_index", model_index, parameter.shape[0] - 1)
    eps = check_real(_NAME, "eps", eps, 0)
    return _Request(x, groups, weight, bias, eps, addend, scale, shift, check_bool(_NAME, "silu", silu), model_index)


def _run_reference(request: _Request) -> Tensor:
    return definition.group_norm_silu(
        request.x,
        request.groups,
        request.weight,
        request.bias,
        eps=request.eps,
        addend=request.addend,
        scale=request.scale,
        shift=request.shift,
        silu=request.silu,
        model_index=request.model_index,
    )


def _native_layout(x: Tensor) -> tuple[int, int] | None:
    """The strides of rows and positions where x is channels-last, in elements; else None."""
    rows, channels, *sizes = x.shape
    if x.numel() == 0:
        return (0, channels)
    if channels > 1 and x.stride(1) != 1:
        return None
    position_stride, reach = channels, 0
    for size, stride in reversed(list(zip(sizes, x.stride()[2:], strict=True))):
        if size == 1:
            continue
        if reach == 0:
            position_stride = reach = stride
        elif stride != reach:
            return None
        reach *= size
    return (x.stride(0) if rows > 1 else 0, position_stride)


def _vector(vector: Tensor | None) -> Tensor | None:
    """As the extension reads it: float32, the channels next to each other."""
    if vector is None:
        return None
    vector = vector.to(torch.float32).resolve_neg()
    return vector if vector.stride(-1) == 1 else vector.contiguous()


def _run_cpp(request: _Request) -> Tensor:
    from guda_fast import _C

    x = request.x
    rows, channels, *sizes = x.shape
    layout = _native_layout(x)
    assert layout is not None, "_cpp_supports was asked"
    out = torch.empty((rows, *sizes, channels), dtype=x.dtype).movedim(-1, 1)
    positions = torch.Size(sizes).numel()
    weight, bias = (None if v is None else _affine(v) for v in (request.weight, request.bias))
    index = None if request.model_index is None else request.model_index.contiguous()
    models = min((v.shape[0] for v in (weight, bias) if v is not None and v.dim() == 2), default=rows)
    addend, scale, shift = (_vector(vector) for vector in (request.addend, request.scale, request.shift))
    _C.group_norm_silu(
        out.data_ptr(),
        (positions * channels, channels),
        x.data_ptr(),
        layout,
        str(x.dtype).removeprefix("torch."),
        rows,
        positions,
        channels,
        request.groups,
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        models,
        0 if index is None or (weight is None and bias is None) else index.data_ptr(),
        0 if addend is None else addend.data_ptr(),
        0 if addend is None else addend.stride(0),
        0 if scale is None else scale.data_ptr(),
        0 if scale is None else scale.stride(0),
        0 if shift is None else shift.data_ptr(),
        0 if shift is None else shift.stride(0),
        request.eps,
        request.silu,
        torch.get_num_threads(),
    )
    return out


def _affine(parameter: Tensor) -> Tensor:
    return parameter.to(torch.float32).resolve_neg().contiguous()


def _cpp_supports(request: _Request) -> str | None:
    x = request.x
    if x.dtype == torch.float16:
        return "x is float16, which cpp does not read in this op"
    if _native_layout(x) is None:
        return "x is not in channels-last (to(memory_format=torch.channels_last) makes it so)"
    return native_reason(x=x)


_REFERENCE = _backends.Backend("reference", _run_reference)
_CPP = _backends.Backend("cpp", _run_cpp, _cpp_supports, _backends.native_unavailable, _backends.native_detail)
_OP = _backends.register(_backends.Op(_NAME, _request, {"cpu": (_CPP, _REFERENCE), "*": (_REFERENCE,)}))
