"""The op `denoising_error`: squared errors of many models' predictions against a regenerated target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from guda_fast import reference as definition
from guda_fast._validate import check_bool, check_tensor
from guda_fast.ops import _library
from guda_fast.ops._rows import NativeRows, Rows, Sizes, check_rows, check_seed, device_and_stream, register
from guda_fast.reference.denoising_error import DenoisingError

_NAME = "denoising_error"
_PREDICTION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Request:
    predictions: Tensor
    rows: Rows
    weight: Tensor
    seed: int
    antithetic: bool
    paired: bool

    @property
    def device(self) -> torch.device:
        return self.rows.x0.device

    @property
    def by_pointer(self) -> Mapping[str, Tensor | None]:
        return {"x0": self.rows.x0, "predictions": self.predictions}

    def make_results(self) -> DenoisingError:
        errors = torch.empty(self.predictions.shape[:2], dtype=torch.float64, device=self.device)
        return DenoisingError(errors, torch.empty_like(errors) if self.paired else None)

    def native_arguments(
        self, results: DenoisingError, rows: Rows, weight: Tensor
    ) -> tuple[int, int, int, Sizes, str, int, *NativeRows, int, int, bool]:
        """The extension's arguments up to antithetic, valid while results, (contiguous) rows and weight live."""
        return (
            results.errors.data_ptr(),
            0 if results.paired is None else results.paired.data_ptr(),
            self.predictions.data_ptr(),
            self.predictions.stride(),
            str(self.predictions.dtype).removeprefix("torch."),
            self.predictions.shape[0],
            *rows.native_arguments(),
            weight.data_ptr(),
            self.seed,
            self.antithetic,
        )


def denoising_error(
    predictions: Tensor,
    x0: Tensor,
    query_index: Tensor,
    query_id: Tensor,
    timestep: Tensor,
    sample: Tensor,
    x0_scale: Tensor,
    eps_scale: Tensor,
    weight: Tensor,
    *,
    seed: int,
    antithetic: bool = False,
    paired: bool = False,
    backend: str = "auto",
) -> DenoisingError:
    """Weighted squared errors of M models at R rows, against a target made again from its counters.

    target[r] = x0_scale[r] x0[query_index[r]] + eps_scale[r] eps(seed, query_id[r], timestep[r], sample[r])
    errors[m, r] = weight[r] sum (predictions[m, r] - target[r])^2
    paired[m, r] = weight[r] sum (p_m - p_0) (p_m + p_0 - 2 target), the difference without cancellation
    Differences are taken in float32, products and sums in float64.

    predictions: what each model predicts, any strides [(M, R, *S), float32, bfloat16 or float16]
    x0, query_index, query_id, timestep, sample, seed, antithetic: as in `add_noise`
    x0_scale, eps_scale: the target's factors; (0, 1) is an epsilon prediction, (1, 0) a sample,
        (-sqrt(1 - alpha_bar), sqrt(alpha_bar)) a v-prediction [(R,), x0's dtype]
    weight: factor of each row's error [(R,), float64]
    paired: return the paired differences too; those of model 0 are exactly 0
    backend: "auto" or a name, see `explain`

    With a float64 x0 predictions may be float64 too, and everything is in float64, by the reference backend.
    Index ranges are checked on the CPU; elsewhere that would synchronise, and they are the caller's duty.

    Returns DenoisingError(errors, paired) [(M, R), float64; paired is None unless asked], without gradient.
    Raises TypeError or ValueError naming the argument; BackendUnavailableError where a named backend cannot.
    Source: kernels/NOISE.md; Ho et al. 2020, equation 14.

    >>> zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    >>> x0, prediction, weight = torch.ones(1, 3), torch.zeros(1, 1, 3), torch.ones(1, dtype=torch.float64)
    >>> denoising_error(prediction, x0, zero, zero, zero, zero, 2 * one, 0 * one, weight, seed=0).errors
    tensor([[12.]], dtype=torch.float64)
    """
    tensors = (predictions, x0, query_index, query_id, timestep, sample, x0_scale, eps_scale, weight)
    if _library.is_recorded():
        return _compiled(tensors, seed, antithetic, paired, backend)
    return _OP.run(_request(*tensors, seed=seed, antithetic=antithetic, paired=paired), backend)


def _request(
    predictions: Tensor,
    x0: Tensor,
    query_index: Tensor,
    query_id: Tensor,
    timestep: Tensor,
    sample: Tensor,
    x0_scale: Tensor,
    eps_scale: Tensor,
    weight: Tensor,
    *,
    seed: int,
    antithetic: bool = False,
    paired: bool = False,
) -> _Request:
    rows = check_rows(_NAME, x0, query_index, query_id, timestep, sample, x0_scale, eps_scale)
    dtypes = _PREDICTION_DTYPES if x0.dtype == torch.float32 else (*_PREDICTION_DTYPES, torch.float64)
    shape = (None, rows.number, *rows.shape)
    check_tensor(_NAME, "predictions", predictions, shape=shape, dtypes=dtypes, device=x0.device)
    check_tensor(_NAME, "weight", weight, shape=(rows.number,), dtypes=(torch.float64,), device=x0.device)
    return _Request(
        predictions,
        rows,
        weight,
        check_seed(_NAME, seed),
        check_bool(_NAME, "antithetic", antithetic),
        check_bool(_NAME, "paired", paired),
    )


def _run_reference(request: _Request) -> DenoisingError:
    return definition.denoising_error(
        request.predictions,
        *request.rows,
        request.weight,
        seed=request.seed,
        antithetic=request.antithetic,
        paired=request.paired,
    )


def _run_cpp(request: _Request) -> DenoisingError:
    from guda_fast import _C

    rows, weight, results = request.rows.contiguous(), request.weight.contiguous(), request.make_results()
    _C.denoising_error(*request.native_arguments(results, rows, weight), torch.get_num_threads())
    return results


def _run_cuda(request: _Request) -> DenoisingError:
    from guda_fast import _C

    rows, weight, results = request.rows.contiguous(), request.weight.contiguous(), request.make_results()
    models = request.predictions.shape[0]
    size = _C.cuda_denoising_error_workspace(models, rows.number, rows.shape.numel(), request.paired)
    workspace = torch.empty(size, dtype=torch.float64, device=request.device)
    _C.cuda_denoising_error(
        *request.native_arguments(results, rows, weight),
        workspace.data_ptr(),
        size,
        *device_and_stream(request.device),
    )
    return results


def _run_triton(request: _Request) -> DenoisingError:
    from guda_fast.kernels.triton.denoising_error import denoising_error as launch

    results = request.make_results()
    launch(
        *results,
        request.predictions,
        *request.rows.contiguous().split(),
        request.weight.contiguous(),
        seed_bits=_library.seed_to_bits(request.seed),
        antithetic=request.antithetic,
    )
    return results


_RUNS = {"reference": _run_reference, "cpp": _run_cpp, "triton": _run_triton, "cuda": _run_cuda}
_OP = register(denoising_error, _request, _RUNS)


def _registered(
    predictions: Tensor,
    x0: Tensor,
    query_index: Tensor,
    query_id: Tensor,
    timestep: Tensor,
    sample: Tensor,
    x0_scale: Tensor,
    eps_scale: Tensor,
    weight: Tensor,
    seed_bits: int,
    antithetic: bool,
    paired: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """A schema knows no optional result: without `paired` the second is empty."""
    request = _request(
        predictions, x0, query_index, query_id, timestep, sample, x0_scale, eps_scale, weight,
        seed=_library.seed_from_bits(seed_bits), antithetic=antithetic, paired=paired,
    )  # fmt: skip
    errors, differences = _OP.run(request, backend)
    return errors, errors.new_empty((0,)) if differences is None else differences


def _fake(predictions: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    *_, paired, _ = arguments
    errors = predictions.new_empty(predictions.shape[:2], dtype=torch.float64)
    return errors, torch.empty_like(errors) if paired else errors.new_empty((0,))


_NODE = _library.register(_NAME, _registered, _fake)


def _compiled(tensors: tuple[Tensor, ...], seed: int, antithetic: bool, paired: bool, backend: str) -> DenoisingError:
    """The call as one node of the graph. Detached arguments: as in eager calls the result carries no gradient."""
    bits = _library.seed_to_bits(check_seed(_NAME, seed))
    detached = [tensor.detach() if tensor.is_floating_point() else tensor for tensor in tensors]
    errors, differences = _NODE(*detached, bits, antithetic, paired, backend)
    return DenoisingError(errors, differences if paired else None)
