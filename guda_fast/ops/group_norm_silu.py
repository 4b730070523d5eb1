"""The op `group_norm_silu`: group norm with the addition, the affine map and the activation around it."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor

from guda_fast import _backends
from guda_fast import reference as definition
from guda_fast._validate import check_bool, check_index_range, check_int, check_real, check_tensor
from guda_fast.ops import _library
from guda_fast.ops._looks import Remembered, looks
from guda_fast.ops._rows import native_reason

_NAME = "group_norm_silu"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # of the extension
_PER_ROW = ("addend", "scale", "shift")
_TRITON_MAX_WIDTH = 2**16  # a tile holds all channels of a group


class _Vectors(NamedTuple):
    """The optional tensors, in the order of the registered op."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    model_index: Tensor | None = None
    addend: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


class _Request(NamedTuple):
    x: Tensor
    groups: int
    vectors: _Vectors
    eps: float
    silu: bool
    strides: tuple[int, int, int] | None  # as of _strides

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
    vectors = _Vectors(weight, bias, model_index, addend, scale, shift)
    if _library.is_recorded():
        return _compiled(x, groups, vectors, eps, silu, backend)
    return _eager(x, groups, vectors, eps, silu, backend)


def _eager(x: Tensor, groups: int, vectors: _Vectors, eps: float, silu: bool, backend: str) -> Tensor:
    """The op itself; what looks like a call that was checked is not checked again."""
    weight, bias, model_index, addend, scale, shift = vectors
    seen = looks(x, weight, bias, addend, scale, shift)
    # Whether an index is in range is no matter of looks, nor is the type of numbers that compare equal.
    numbers = type(groups) is int and type(eps) is float and type(silu) is bool
    if seen is None or model_index is not None or not numbers:
        return _OP.run(_checked(x, groups, vectors, eps, silu), backend)
    key = (groups, eps, silu, _backends.requested_backend(_NAME, backend).name, seen)
    geometry = _CPP_CALLS.get(key)
    if geometry is not None:
        return _launched(torch.empty_like(x), x, vectors, geometry)
    request = _checked(x, groups, vectors, eps, silu)
    out = _OP.run(request, backend)
    if _OP.chosen(request, backend) is _CPP and all(map(operator.is_, _readable(vectors, torch.float32), vectors)):
        _CPP_CALLS.keep(key, _geometry(request, out))
    return out


def _request(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    silu: bool = True,
    **vectors: Tensor | None,
) -> _Request:
    return _checked(x, groups, _Vectors(weight, bias, **vectors), eps, silu)


def _checked(x: Tensor, groups: int, vectors: _Vectors, eps: float, silu: bool) -> _Request:
    check_tensor(_NAME, "x", x, min_dim=2, max_dim=5, dtypes=_DTYPES)
    rows, channels = x.shape[:2]
    groups = check_int(_NAME, "groups", groups, 1)
    if channels % groups:
        raise ValueError(f"{_NAME}: groups must divide the {channels} channels of x, got {groups}")
    dtypes = (torch.float32, x.dtype) if x.dtype.itemsize == 2 else (x.dtype,)
    model_index = vectors.model_index
    affine = (channels,) if model_index is None else (None, channels)
    for name, vector in zip(_Vectors._fields, vectors, strict=True):
        if vector is not None and name != "model_index":
            shape = (rows, channels) if name in _PER_ROW else affine
            check_tensor(_NAME, name, vector, shape=shape, dtypes=dtypes, device=x.device)
    if model_index is not None:
        check_tensor(_NAME, "model_index", model_index, shape=(rows,), dtypes=(torch.int64,), device=x.device)
        for parameter in (vectors.weight, vectors.bias):
            if parameter is not None:
                check_index_range(_NAME, "model_index", model_index, parameter.shape[0] - 1)
    eps, silu = check_real(_NAME, "eps", eps, 0), check_bool(_NAME, "silu", silu)
    return _Request(x, groups, vectors, eps, silu, _strides(x))


def _run_reference(request: _Request) -> Tensor:
    x, groups, vectors, eps, silu, _ = request
    return definition.group_norm_silu(x, groups, **vectors._asdict(), eps=eps, silu=silu)


def _strides(x: Tensor) -> tuple[int, int, int] | None:
    """In elements, of rows, channels and positions, where the positions lie evenly; else None."""
    rows, channels, *sizes = x.shape
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return (sizes[0] * sizes[1] * channels, 1, channels)
    if x.numel() == 0:
        return (0, 1, channels)
    position_stride = reach = 0
    for size, stride in reversed(list(zip(sizes, x.stride()[2:], strict=True))):
        if size == 1:
            continue
        if reach == 0:
            position_stride = reach = stride
        if stride != reach or stride == 0:
            return None
        reach *= size
    return (x.stride(0) if rows > 1 else 0, x.stride(1) if channels > 1 else 1, position_stride or channels)


def _is_channels_last(request: _Request) -> bool:
    if request.strides is None:
        return False
    channels, positions = request.x.shape[1], request.x.shape[2:].numel()
    row, channel, position = request.strides
    # What overlaps, or has its rows further inside, would not be written in the same layout.
    return channel == 1 and position >= channels and (row == 0 or row >= (positions - 1) * position + channels)


def _readable(vectors: _Vectors, dtype: torch.dtype | None = None) -> _Vectors:
    """As kernels read them by pointer: the channels next to each other, and only rows' vectors apart."""

    def plain(name: str, vector: Tensor | None) -> Tensor | None:
        # Cheap questions first: each conversion that does nothing still costs a call.
        if vector is None or (vector.dtype == dtype and vector.is_contiguous() and not vector.is_neg()):
            return vector
        if name != "model_index":
            vector = vector.to(dtype or vector.dtype).resolve_neg()
        return vector if name in _PER_ROW and vector.stride(-1) == 1 else vector.contiguous()

    return _Vectors(*map(plain, _Vectors._fields, vectors))


class _Geometry(NamedTuple):
    """What the extension is told beside addresses; the same for all calls that look alike."""

    to: tuple[int, int]  # strides of rows and positions of the result
    at: tuple[int, int]  # and of x
    dtype: str
    rows: int
    positions: int
    channels: int
    groups: int
    models: int
    eps: float
    silu: bool


def _geometry(request: _Request, out: Tensor) -> _Geometry:
    x, groups, vectors, eps, silu, at = request
    to = _strides(out)
    assert to is not None and at is not None, "_cpp_supports was asked"
    rows, channels = x.shape[:2]
    models = min((v.shape[0] for v in vectors[:2] if v is not None and v.dim() == 2), default=rows)
    sizes = (rows, x.shape[2:].numel(), channels, groups, models)
    return _Geometry((to[0], to[2]), (at[0], at[2]), _DTYPE_NAMES[x.dtype], *sizes, eps, silu)


def _run_cpp(request: _Request) -> Tensor:
    out = torch.empty_like(request.x)
    return _launched(out, request.x, _readable(request.vectors, torch.float32), _geometry(request, out))


def _launched(out: Tensor, x: Tensor, vectors: _Vectors, geometry: _Geometry) -> Tensor:
    """Fills out; vectors as `_readable` gives them."""
    from guda_fast import _C

    weight, bias, index, addend, scale, shift = vectors
    to, at, dtype, rows, positions, channels, groups, models, eps, silu = geometry
    _C.group_norm_silu(
        out.data_ptr(),
        to,
        x.data_ptr(),
        at,
        dtype,
        rows,
        positions,
        channels,
        groups,
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        models,
        0 if index is None or (weight is None and bias is None) else index.data_ptr(),
        *_pointer_and_stride(addend),
        *_pointer_and_stride(scale),
        *_pointer_and_stride(shift),
        eps,
        silu,
        torch.get_num_threads(),
    )
    return out


def _pointer_and_stride(vector: Tensor | None) -> tuple[int, int]:
    return (0, 0) if vector is None else (vector.data_ptr(), vector.stride(0))


def _cpp_supports(request: _Request) -> str | None:
    if request.x.dtype == torch.float16:
        return "x is float16, which cpp does not read in this op"
    if not _is_channels_last(request):
        return "x is not in channels-last (to(memory_format=torch.channels_last) makes it so)"
    return native_reason(x=request.x)


def _run_triton(request: _Request) -> Tensor:
    from guda_fast.kernels.triton.group_norm_silu import group_norm_silu as launch

    x, groups, vectors, eps, silu, at = request
    out = torch.empty_like(x)
    to = _strides(out)
    assert to is not None and at is not None, "_triton_supports was asked"
    launch(out, to, x, at, groups, _readable(vectors), eps=eps, silu=silu)
    return out


def _triton_supports(request: _Request) -> str | None:
    x, groups = request.x, request.groups
    if request.strides is None:
        return "the positions of x do not lie evenly in memory (contiguous() makes them)"
    if x.shape[1] // groups > _TRITON_MAX_WIDTH:
        return f"groups have {x.shape[1] // groups} channels, and triton takes {_TRITON_MAX_WIDTH} at most"
    return _backends.triton_device_reason(request.device) or native_reason("triton", x=x)


_REFERENCE = _backends.Backend("reference", _run_reference)
_CPP = _backends.Backend("cpp", _run_cpp, _cpp_supports, _backends.native_unavailable, _backends.native_detail)
_TRITON = _backends.Backend("triton", _run_triton, _triton_supports, _backends.triton_unavailable)
_TABLE = {"cpu": (_CPP, _REFERENCE, _TRITON), "cuda": (_TRITON, _REFERENCE), "*": (_REFERENCE,)}
_OP = _backends.register(_backends.Op(_NAME, _request, _TABLE, group_norm_silu))
_CPP_CALLS = Remembered[_Geometry]()


def _registered(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    model_index: Tensor | None,
    addend: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    silu: bool,
    backend: str,
) -> Tensor:
    vectors = _Vectors(weight, bias, model_index, addend, scale, shift)
    return _eager(x, groups, vectors, eps, silu, backend)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


_NODE = _library.register(_NAME, _registered, _fake)


def _compiled(x: Tensor, groups: int, vectors: _Vectors, eps: float, silu: bool, backend: str) -> Tensor:
    """The call as one node of the graph. Detached arguments: as in eager calls the result carries no gradient."""
    detached = (None if vector is None else vector.detach() for vector in vectors)
    node: Tensor = _NODE(x.detach(), groups, *detached, eps, silu, backend)
    return node
