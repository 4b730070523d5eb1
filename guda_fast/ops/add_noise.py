"""The op `add_noise`: noised queries for many (query, draw) rows at once, with noise made from counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from guda_fast import reference as definition
from guda_fast._validate import check_bool, check_output
from guda_fast.ops import _library
from guda_fast.ops._rows import Rows, check_rows, check_seed, device_and_stream, register

_NAME = "add_noise"


@dataclass(frozen=True)
class _Request:
    rows: Rows
    seed: int
    antithetic: bool
    out: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.rows.x0.device

    @property
    def by_pointer(self) -> Mapping[str, Tensor | None]:
        return {"x0": self.rows.x0, "out": self.out}

    def make_out(self) -> Tensor:
        if self.out is not None:
            return self.out
        return torch.empty((self.rows.number, *self.rows.shape), dtype=torch.float32, device=self.device)


def add_noise(
    x0: Tensor,
    query_index: Tensor,
    query_id: Tensor,
    timestep: Tensor,
    sample: Tensor,
    x0_scale: Tensor,
    eps_scale: Tensor,
    *,
    seed: int,
    antithetic: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Noised queries, one a row, with noise that depends on nothing but its counters.

    out[r] = x0_scale[r] x0[query_index[r]] + eps_scale[r] eps(seed, query_id[r], timestep[r], sample[r])

    x0: the queries, any strides, elements counted in logical order [(N, *S), float32, S of 1 to 4 dimensions;
        with float64 everything is computed in float64, by the reference backend]
    query_index: which query a row takes [(R,), int64, 0..N-1]
    query_id: the bits of the query's uint64 id [(R,), int64]
    timestep, sample: the draw [(R,), int64, 0..65535]
    x0_scale, eps_scale: factors of the query and of the noise; where x0_scale is 0 the query does not enter
        the result, NaN or not [(R,), x0's dtype]
    seed: the protocol's seed [0..2**64-1]
    antithetic: sample 2m+1 is the negative of sample 2m
    out: where the result goes; may have any strides but neither overlap itself nor an input [(R, *S), x0's dtype]
    backend: "auto" or a name, see `explain`

    Index ranges are checked on the CPU; elsewhere that would synchronise, and they are the caller's duty.

    Returns out, or a new contiguous tensor. It carries no gradient.
    Raises TypeError or ValueError naming the argument; BackendUnavailableError where a named backend cannot.
    Source: kernels/NOISE.md; Ho et al. 2020, equation 4.

    >>> zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    >>> add_noise(torch.ones(1, 3), zero, zero, zero, zero, 2 * one, 0 * one, seed=0)
    tensor([[2., 2., 2.]])
    """
    rows = (x0, query_index, query_id, timestep, sample, x0_scale, eps_scale)
    if _library.is_recorded():
        return _compiled(*rows, seed, antithetic, out, backend)
    return _OP.run(_request(*rows, seed=seed, antithetic=antithetic, out=out), backend)


def _request(
    x0: Tensor,
    query_index: Tensor,
    query_id: Tensor,
    timestep: Tensor,
    sample: Tensor,
    x0_scale: Tensor,
    eps_scale: Tensor,
    *,
    seed: int,
    antithetic: bool = False,
    out: Tensor | None = None,
) -> _Request:
    rows = check_rows(_NAME, x0, query_index, query_id, timestep, sample, x0_scale, eps_scale)
    if out is not None:
        check_output(_NAME, "out", out, shape=(rows.number, *rows.shape), inputs=rows._asdict())
    return _Request(rows, check_seed(_NAME, seed), check_bool(_NAME, "antithetic", antithetic), out)


def _run_reference(request: _Request) -> Tensor:
    return definition.add_noise(*request.rows, seed=request.seed, antithetic=request.antithetic, out=request.out)


def _run_cpp(request: _Request) -> Tensor:
    from guda_fast import _C

    rows, out = request.rows.contiguous(), request.make_out()
    _C.add_noise(
        out.data_ptr(),
        out.stride(),
        *rows.native_arguments(),
        request.seed,
        request.antithetic,
        torch.get_num_threads(),
    )
    return out


def _run_cuda(request: _Request) -> Tensor:
    from guda_fast import _C

    rows, out = request.rows.contiguous(), request.make_out()
    _C.cuda_add_noise(
        out.data_ptr(),
        out.stride(),
        *rows.native_arguments(),
        request.seed,
        request.antithetic,
        *device_and_stream(request.device),
    )
    return out


def _run_triton(request: _Request) -> Tensor:
    from guda_fast.kernels.triton.add_noise import add_noise as launch

    rows, out = request.rows.contiguous(), request.make_out()
    launch(out, *rows.split(), seed_bits=_library.seed_to_bits(request.seed), antithetic=request.antithetic)
    return out


_RUNS = {"reference": _run_reference, "cpp": _run_cpp, "triton": _run_triton, "cuda": _run_cuda}
_OP = register(add_noise, _request, _RUNS)


def _registered(
    x0: Tensor,
    query_index: Tensor,
    query_id: Tensor,
    timestep: Tensor,
    sample: Tensor,
    x0_scale: Tensor,
    eps_scale: Tensor,
    seed_bits: int,
    antithetic: bool,
    backend: str,
) -> Tensor:
    request = _request(
        x0, query_index, query_id, timestep, sample, x0_scale, eps_scale,
        seed=_library.seed_from_bits(seed_bits), antithetic=antithetic,
    )  # fmt: skip
    return _OP.run(request, backend)


def _fake(x0: Tensor, query_index: Tensor, *_: object) -> Tensor:
    return x0.new_empty((query_index.shape[0], *x0.shape[1:]))


def _registered_out(
    x0: Tensor,
    query_index: Tensor,
    query_id: Tensor,
    timestep: Tensor,
    sample: Tensor,
    x0_scale: Tensor,
    eps_scale: Tensor,
    seed_bits: int,
    antithetic: bool,
    out: Tensor,
    backend: str,
) -> None:
    request = _request(
        x0, query_index, query_id, timestep, sample, x0_scale, eps_scale,
        seed=_library.seed_from_bits(seed_bits), antithetic=antithetic, out=out,
    )  # fmt: skip
    _OP.run(request, backend)


def _fake_out(*_: object) -> None:
    return None


_NODE = _library.register(_NAME, _registered, _fake)
_NODE_OUT = _library.register(f"{_NAME}_out", _registered_out, _fake_out, mutates=("out",))


def _compiled(
    x0: Tensor,
    query_index: Tensor,
    query_id: Tensor,
    timestep: Tensor,
    sample: Tensor,
    x0_scale: Tensor,
    eps_scale: Tensor,
    seed: int,
    antithetic: bool,
    out: Tensor | None,
    backend: str,
) -> Tensor:
    """The call as one node of the graph. Detached arguments: as in eager calls the result carries no gradient."""
    bits = _library.seed_to_bits(check_seed(_NAME, seed))
    rows = (x0.detach(), query_index, query_id, timestep, sample, x0_scale.detach(), eps_scale.detach())
    if out is None:
        node: Tensor = _NODE(*rows, bits, antithetic, backend)
        return node
    _NODE_OUT(*rows, bits, antithetic, out, backend)
    return out
