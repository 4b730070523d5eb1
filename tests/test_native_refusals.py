"""Calls of `_C` that every native backend of the noise ops refuses: an exception, and nothing read or written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from guda_fast import _C
from native_calls import Rows, add_noise_arguments, denoising_error_arguments

WITH_CUDA = bool(_C.cuda_status()["compiled"])
needs_cuda = pytest.mark.skipif(not WITH_CUDA, reason="the extension is built without CUDA")
BACKENDS = ["cpp", pytest.param("cuda", marks=needs_cuda)]
Call = Callable[..., None]


def rows_of_two() -> Rows:
    rows = Rows(2, 2)
    rows.query_index[:] = torch.tensor([0, 1])
    return rows


def native_call(op: str, backend: str) -> tuple[Call, dict[str, Any], torch.Tensor]:
    """The function, valid arguments on CPU memory, and the output. The tensors live as long as the function."""
    rows, x0 = rows_of_two(), torch.zeros(2, 3, 4)
    if op == "add_noise":
        out = torch.zeros(2, 3, 4)
        arguments, alive = add_noise_arguments(out, x0, rows), (rows, x0, out)
    else:
        out, predictions = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, 3, 4)
        arguments, alive = denoising_error_arguments(out, None, predictions, x0, rows), (rows, x0, predictions)
    name = op
    if backend == "cuda":
        name = f"cuda_{op}"
        del arguments["threads"]
        arguments |= {"device": 0, "stream": 0}
        if op == "denoising_error":
            arguments |= {"workspace": 0, "workspace_size": 0}

    def call(**change: Any) -> None:
        assert alive
        getattr(_C, name)(**{**arguments, **change})

    return call, arguments, out


VECTORS = {"query_index": 8, "query_id": 8, "timestep": 8, "sample": 8, "x0_scale": 4, "eps_scale": 4}
SHARED: list[tuple[dict[str, Any], str]] = [
    ({"rows": -1}, "rows must be at least 0, got -1"),
    ({"queries": -1}, "queries must be at least 0, got -1"),
    ({"shape": []}, "shape must have 1 to 4 dimensions, got 0"),
    ({"shape": [1, 1, 1, 1, 1]}, "shape must have 1 to 4 dimensions, got 5"),
    ({"shape": [3, -1]}, "shape must have no negative size, got -1"),
    ({"shape": [2**20, 2**20]}, r"shape must have at most 2\*\*34 elements"),
    ({"x0_strides": [1, 1]}, "x0_strides must have 3 entries, got 2"),
    ({"x0_strides": [2**62, 4, 1]}, r"x0_strides must reach at most 2\*\*59 elements"),
    ({"x0_strides": [12, -(2**63), 1]}, r"x0_strides must reach at most 2\*\*59 elements"),
    ({"x0_strides": [2**58, 2**57, 2**57]}, r"x0_strides must reach at most 2\*\*59 elements"),
    ({"rows": 2**62}, r"rows must have at most 2\*\*63 - 1 elements together, got \d+ rows of 12"),
    ({"x0": 0}, "x0 must not be a null pointer"),
    *(({name: 0}, f"{name} must not be a null pointer") for name in VECTORS),
]
ADD_NOISE: list[tuple[dict[str, Any], str]] = [
    *SHARED,
    ({"out": 0}, "out must not be a null pointer"),
    ({"out_strides": [12, 4, 1, 1]}, "out_strides must have 3 entries, got 4"),
    ({"out_strides": [12, 0, 1]}, "out_strides must not let elements overlap"),
    ({"out_strides": [0, 4, 1]}, "out_strides must not let elements overlap"),
    ({"out_strides": [2**60, 4, 1]}, r"out_strides must reach at most 2\*\*59 elements"),
]
DENOISING_ERROR: list[tuple[dict[str, Any], str]] = [
    *SHARED,
    ({"errors": 0}, "errors must not be a null pointer"),
    ({"weight": 0}, "weight must not be a null pointer"),
    ({"predictions": 0}, "predictions must not be a null pointer"),
    ({"prediction_strides": [24, 12, 4]}, "prediction_strides must have 4 entries, got 3"),
    ({"prediction_strides": [2**60, 12, 4, 1]}, r"prediction_strides must reach at most 2\*\*59 elements"),
    ({"models": -1}, "models must be at least 0, got -1"),
    ({"models": 2**60}, r"predictions must have at most 2\*\*63 - 1 elements, got \d+ models and 2 rows"),
    ({"dtype": "float64"}, "dtype must be one of 'float32', 'bfloat16', 'float16', got 'float64'"),
]


def identify(change: object) -> str:
    return "-".join(f"{name}={value}" for name, value in change.items()) if isinstance(change, dict) else ""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("change", "message"), ADD_NOISE, ids=identify)
def test_add_noise(backend: str, change: dict[str, Any], message: str) -> None:
    call, _, out = native_call("add_noise", backend)
    with pytest.raises(ValueError, match=f"add_noise: {message}"):
        call(**change)
    assert (out == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("change", "message"), DENOISING_ERROR, ids=identify)
def test_denoising_error(backend: str, change: dict[str, Any], message: str) -> None:
    call, _, out = native_call("denoising_error", backend)
    with pytest.raises(ValueError, match=f"denoising_error: {message}"):
        call(**change)
    assert (out == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("op", "name", "alignment"),
    [
        *(("add_noise", name, alignment) for name, alignment in {**VECTORS, "x0": 4, "out": 4}.items()),
        *(("denoising_error", name, 8) for name in ("errors", "paired", "weight")),
        ("denoising_error", "predictions", 4),
    ],
)
def test_misaligned_pointers(backend: str, op: str, name: str, alignment: int) -> None:
    call, arguments, out = native_call(op, backend)
    off = (arguments[name] or arguments["errors"]) + alignment // 2
    with pytest.raises(ValueError, match=f"{op}: {name} must be aligned to {alignment} bytes"):
        call(**{name: off})
    assert (out == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_aligned_to_two_bytes(backend: str) -> None:
    call, arguments, _ = native_call("denoising_error", backend)
    with pytest.raises(ValueError, match="denoising_error: predictions must be aligned to 2 bytes"):
        call(predictions=arguments["predictions"] + 1, dtype="bfloat16")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["add_noise", "denoising_error"])
@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_of_other_widths(backend: str, op: str, seed: int) -> None:
    call, *_ = native_call(op, backend)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        call(seed=seed)


@needs_cuda
class TestCuda:
    @pytest.mark.parametrize("op", ["add_noise", "denoising_error"])
    def test_device(self, op: str) -> None:
        call, *_ = native_call(op, "cuda")
        with pytest.raises(ValueError, match=f"{op}: device must be at least 0, got -1"):
            call(device=-1)

    @pytest.mark.parametrize("op", ["add_noise", "denoising_error"])
    def test_a_grid_past_its_limit(self, op: str) -> None:
        call, *_ = native_call(op, "cuda")
        big = {"rows": 2**31, "shape": [4], "x0_strides": [12, 1]}
        more = {"out_strides": [4, 1]} if op == "add_noise" else {"prediction_strides": [4, 4, 1]}
        with pytest.raises(ValueError, match=f"{op}: rows must be at most 2147483647 at this size, got 2147483648"):
            call(**big, **more)

    def test_workspace(self) -> None:
        needed = _C.cuda_denoising_error_workspace(2, 2, 3 * 4096, True)
        assert needed == 2 * 2 * 3 * 2
        assert _C.cuda_denoising_error_workspace(2, 2, 3 * 4096 - 1, False) == 12
        assert _C.cuda_denoising_error_workspace(2, 2, 4096, True) == 0
        assert _C.cuda_denoising_error_workspace(2, 2, 0, True) == 0
        call, *_ = native_call("denoising_error", "cuda")
        big = {"shape": [3 * 4096], "x0_strides": [0, 1], "prediction_strides": [0, 0, 1]}
        with pytest.raises(ValueError, match="workspace must have at least 12 values, got 11"):
            call(**big, workspace=8, workspace_size=11)
        with pytest.raises(ValueError, match="workspace must not be a null pointer"):
            call(**big, workspace=0, workspace_size=12)
        with pytest.raises(ValueError, match="workspace must be aligned to 8 bytes"):
            call(**big, workspace=4, workspace_size=12)

    @pytest.mark.parametrize("name", ["models", "rows", "elements"])
    def test_workspace_sizes(self, name: str) -> None:
        sizes = {"models": 2, "rows": 2, "elements": 8192}
        with pytest.raises(ValueError, match=f"denoising_error: {name} must be at least 0, got -1"):
            _C.cuda_denoising_error_workspace(**{**sizes, name: -1}, paired=False)
        with pytest.raises(ValueError, match=r"models, rows and elements must have a product below 2\*\*63"):
            _C.cuda_denoising_error_workspace(2**30, 2**30, 2**20, False)

    @pytest.mark.parametrize("op", ["add_noise", "denoising_error"])
    def test_a_machine_without_a_device_says_so(self, op: str) -> None:
        error = _C.cuda_status()["error"]
        if not error:
            pytest.skip("there is a CUDA device")
        call, _, out = native_call(op, "cuda")
        with pytest.raises(RuntimeError, match=f"{op}: CUDA: {error}"):
            call()
        assert (out == 0).all()

    def test_a_call_without_work_needs_no_device(self) -> None:
        call, *_ = native_call("add_noise", "cuda")
        call(rows=0, query_index=0, out=0)
        call(shape=[3, 0], out=0, x0=0)
        call, *_ = native_call("denoising_error", "cuda")
        call(models=0, errors=0)
        call(rows=0, errors=0)


@pytest.mark.skipif(WITH_CUDA, reason="the extension is built with CUDA")
def test_without_cuda_its_functions_are_absent() -> None:
    assert [name for name in dir(_C) if name.startswith("cuda_")] == ["cuda_status"]
