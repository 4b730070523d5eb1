"""The op `attention`: softmax attention of many small heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from guda_fast import _backends
from guda_fast import reference as definition
from guda_fast._validate import check_real, check_tensor
from guda_fast.ops import _library
from guda_fast.ops._rows import native_reason
from guda_fast.reference.attention import default_scale

_NAME = "attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Beyond these PyTorch's matrix products are the quicker ones (benchmarks/attention.py; for the baseline set, whose rows
# there are against AVX-512, PyTorch restricted to it by ATEN_CPU_CAPABILITY=default), or, with more keys, float32 sums
# over all of them too long for our bound on errors.
MAX_DIM = {"avx512": 256, "avx2": 256, "baseline": 32}
_MAX_KEYS = 4096
_FEW_QUERIES = 8
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # of the extension


class _Request(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    @property
    def device(self) -> torch.device:
        return self.q.device


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """Softmax attention of every row and head, without mask, causality or dropout.

    out = softmax(scale q k^T) v, the softmax over the keys
    Computed in float32 (float64 for float64 q), and rounded to q's dtype once by `cpp` and `reference`.

    q: queries [(B, H, L, D), float32, bfloat16, float16 or float64]
    k, v: keys and values, of any strides as q; views of (B, S, H, D) memory cost nothing [(B, H, S, D), q's dtype]
    scale: of the scores; 1 / sqrt(D) where None [finite, >= 0]
    backend: "auto" or a name, see `explain`

    Without keys (S = 0) the result is 0.

    Returns a new tensor in the memory order of (B, L, H, D), without gradient: ``out.transpose(1, 2).flatten(2)`` is a
    view [(B, H, L, D), q's dtype].
    Raises TypeError or ValueError naming the argument; BackendUnavailableError where a named backend cannot.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1; Milakov and Gimelshein 2018 (arXiv 1805.02867).

    >>> q = torch.tensor([[[[0.0], [100.0]]]])
    >>> attention(q, torch.tensor([[[[0.0], [1.0]]]]), torch.tensor([[[[1.0], [3.0]]]])).flatten().tolist()
    [2.0, 3.0]
    """
    if _library.is_recorded():
        node: Tensor = _NODE(q.detach(), k.detach(), v.detach(), scale, backend)
        return node
    return _OP.run(_request(q, k, v, scale=scale), backend)


def _request(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> _Request:
    check_tensor(_NAME, "q", q, shape=(None,) * 4, dtypes=_DTYPES)
    rows, heads, _, dim = q.shape
    check_tensor(_NAME, "k", k, shape=(rows, heads, None, dim), dtypes=(q.dtype,), device=q.device)
    check_tensor(_NAME, "v", v, shape=k.shape, dtypes=(q.dtype,), device=q.device)
    return _Request(q, k, v, default_scale(dim) if scale is None else check_real(_NAME, "scale", scale, 0))


def _run_reference(request: _Request) -> Tensor:
    q, k, v, scale = request
    return definition.attention(q, k, v, scale=scale)


def _run_torch(request: _Request) -> Tensor:
    q, k, v, scale = request
    # Already in that order where a fused kernel of PyTorch ran.
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous().transpose(1, 2)


def _run_cpp(request: _Request) -> Tensor:
    from guda_fast import _C

    q, k, v, scale = request
    rows, heads, queries, dim = q.shape
    out = _empty(q)
    _C.attention(
        out.data_ptr(),
        out.stride()[:3],
        q.data_ptr(),
        q.stride()[:3],
        k.data_ptr(),
        k.stride()[:3],
        v.data_ptr(),
        v.stride()[:3],
        _DTYPE_NAMES[q.dtype],
        rows,
        heads,
        queries,
        k.shape[2],
        dim,
        scale,
        torch.get_num_threads(),
    )
    return out


def _cpp_supports(request: _Request) -> str | None:
    q, k, v, _ = request
    if q.dtype == torch.float16:
        return "q is float16, which cpp does not read in this op"
    if k.shape[2] == 0:
        return "there are no keys"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(3) != 1 and tensor.shape[3] > 1:
            return f"the elements of a head do not lie next to each other in {name} (contiguous() makes them)"
    return native_reason(q=q, k=k, v=v) or _size_reason(request)


def _size_reason(request: _Request) -> str | None:
    """Why cpp does not pay at these sizes, or None."""
    _, _, queries, dim = request.q.shape
    keys = request.k.shape[2]
    instruction_set = _backends.native_detail()
    if dim > MAX_DIM[instruction_set]:
        return f"heads have {dim} dimensions, and cpp with {instruction_set} takes {MAX_DIM[instruction_set]} at most"
    if keys > _MAX_KEYS:
        return f"there are {keys} keys, and cpp takes {_MAX_KEYS} at most"
    if queries < min(keys, _FEW_QUERIES):
        return f"{queries} queries are too few for what cpp does to {keys} keys first"
    return None


def _empty(q: Tensor) -> Tensor:
    rows, heads, queries, dim = q.shape
    return q.new_empty((rows, queries, heads, dim)).transpose(1, 2)


_REFERENCE = _backends.Backend("reference", _run_reference)
_TORCH = _backends.Backend("torch", _run_torch)
_CPP = _backends.Backend("cpp", _run_cpp, _cpp_supports, _backends.native_unavailable, _backends.native_detail)
_OTHERS = (_TORCH, _REFERENCE)
_OP = _backends.register(
    _backends.Op(_NAME, _request, {"cpu": (_CPP, *_OTHERS), "cuda": _OTHERS, "*": _OTHERS}, attention)
)


def _registered(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str) -> Tensor:
    return _OP.run(_request(q, k, v, scale=scale), backend)


def _fake(q: Tensor, *_: object) -> Tensor:
    return _empty(q)


_NODE = _library.register(_NAME, _registered, _fake)
