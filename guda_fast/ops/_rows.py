"""What both noise ops share: the rows they work on, their validation, and their table of backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from guda_fast import _backends
from guda_fast._validate import check_index_range, check_int, check_tensor

MAX_COUNTER = 65535  # timestep and sample share one 32-bit word of the counter
MAX_SEED = 2**64 - 1

Sizes: TypeAlias = tuple[int, ...]
NativeRows: TypeAlias = tuple[int, Sizes, Sizes, int, int, int, int, int, int, int, int]


class Rows(NamedTuple):
    """R validated rows of (query, draw); all but x0 have one element a row."""

    x0: Tensor
    query_index: Tensor
    query_id: Tensor
    timestep: Tensor
    sample: Tensor
    x0_scale: Tensor
    eps_scale: Tensor

    @property
    def number(self) -> int:
        return self.query_index.shape[0]

    @property
    def shape(self) -> torch.Size:
        return self.x0.shape[1:]

    def contiguous(self) -> Rows:
        """Rows whose vectors the extension can read by pointer; x0 is read by its strides."""
        return Rows(self.x0, *(vector.contiguous() for vector in self[1:]))

    def split(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x0, and the vectors with one element a row."""
        return self.x0, tuple(self[1:])

    def native_arguments(self) -> NativeRows:
        """The extension's arguments from x0 to eps_scale, valid while these (contiguous) rows live."""
        x0 = self.x0
        return (
            x0.data_ptr(),
            x0.stride(),
            tuple(self.shape),
            x0.shape[0],
            self.number,
            self.query_index.data_ptr(),
            self.query_id.data_ptr(),
            self.timestep.data_ptr(),
            self.sample.data_ptr(),
            self.x0_scale.data_ptr(),
            self.eps_scale.data_ptr(),
        )


def check_rows(
    where: str,
    x0: Tensor,
    query_index: Tensor,
    query_id: Tensor,
    timestep: Tensor,
    sample: Tensor,
    x0_scale: Tensor,
    eps_scale: Tensor,
) -> Rows:
    """Validate the tensors that both ops take: types, shapes, dtypes and devices, then the index ranges."""
    check_tensor(where, "x0", x0, min_dim=2, max_dim=5, dtypes=(torch.float32, torch.float64))
    device = x0.device
    check_tensor(where, "query_index", query_index, shape=(None,), dtypes=(torch.int64,), device=device)
    count = query_index.shape
    for name, tensor in (("query_id", query_id), ("timestep", timestep), ("sample", sample)):
        check_tensor(where, name, tensor, shape=count, dtypes=(torch.int64,), device=device)
    for name, tensor in (("x0_scale", x0_scale), ("eps_scale", eps_scale)):
        check_tensor(where, name, tensor, shape=count, dtypes=(x0.dtype,), device=device)
    check_index_range(where, "query_index", query_index, x0.shape[0] - 1)
    check_index_range(where, "timestep", timestep, MAX_COUNTER)
    check_index_range(where, "sample", sample, MAX_COUNTER)
    return Rows(x0, query_index, query_id, timestep, sample, x0_scale, eps_scale)


def check_seed(where: str, seed: object) -> int:
    return check_int(where, "seed", seed, 0, MAX_SEED)


def native_reason(backend: str = "cpp", **tensors: Tensor | None) -> str | None:
    """Why kernels that read memory by pointers and strides cannot read these tensors, or None."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype == torch.float64:
            return f"{name} is float64, and {backend} computes in float32"
        if tensor.is_neg():
            return f"{name} is a lazily negated view, whose memory holds the opposite values"
    return None


class Request(Protocol):
    """A validated call of a noise op."""

    @property
    def device(self) -> torch.device: ...

    @property
    def by_pointer(self) -> Mapping[str, Tensor | None]:
        """The tensors of any strides that kernels read or write."""
        ...


RequestT = TypeVar("RequestT", bound=Request)
ResultT = TypeVar("ResultT")


def register(
    function: Callable[..., ResultT],
    request: Callable[..., RequestT],
    runs: Mapping[str, Callable[[RequestT], ResultT]],
) -> _backends.Op[RequestT, ResultT]:
    """Make a noise op known by its public function, with what `runs` holds for each backend's name."""

    def native_supports(backend: str) -> Callable[[RequestT], str | None]:
        return lambda request: native_reason(backend, **request.by_pointer)

    def triton_supports(request: RequestT) -> str | None:
        return _backends.triton_device_reason(request.device) or native_reason("triton", **request.by_pointer)

    reference = _backends.Backend("reference", runs["reference"])
    cpp = _backends.Backend(
        "cpp", runs["cpp"], native_supports("cpp"), _backends.native_unavailable, _backends.native_detail
    )
    triton = _backends.Backend("triton", runs["triton"], triton_supports, _backends.triton_unavailable)
    cuda = _backends.Backend("cuda", runs["cuda"], native_supports("cuda"), _backends.cuda_unavailable)
    table = {"cpu": (cpp, reference, triton), "cuda": (triton, cuda, reference), "*": (reference,)}
    return _backends.register(_backends.Op(function.__name__, request, table, function))


def device_and_stream(device: torch.device) -> tuple[int, int]:
    """The index of a CUDA device and its current stream, as the extension takes them."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, int(stream.cuda_stream)
