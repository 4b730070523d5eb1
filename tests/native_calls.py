"""Calls of the extension on arrays, and the noise contract in plain Python, for the tests of `_C` itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from guda_fast import _C

MASK = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 as published, on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            product1 >> 32 ^ c1 ^ k0,
            product1 & MASK,
            product0 >> 32 ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return [c0, c1, c2, c3]


def contract_words(
    blocks: range, query_id: int, timestep: int, sample: int, seed: int
) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """The words of element blocks, as kernels/NOISE.md lays out key and counter."""
    tail = (timestep | sample << 16, query_id & MASK, query_id >> 32 & MASK)
    words = [philox((block, *tail), (seed & MASK, seed >> 32)) for block in blocks]
    return np.array(words, dtype=np.uint32).reshape(-1)


def native_words(
    blocks: range, query_id: int = 0, timestep: int = 0, sample: int = 0, seed: int = 0
) -> np.ndarray[Any, np.dtype[np.uint32]]:
    out = np.zeros(4 * len(blocks), dtype=np.uint32)
    _C.noise_words(out.ctypes.data, len(blocks), blocks.start, query_id, timestep, sample, seed)
    return out


def box_muller(words: np.ndarray[Any, np.dtype[np.uint32]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The float64 normals of the words, through uniforms that are exact."""
    uniforms = ((words >> 9).astype(np.float64) + 0.5) * 2.0**-23
    radius = np.sqrt(-2.0 * np.log(uniforms[0::2]))
    angle = 2.0 * np.pi * uniforms[1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = _C.instruction_set()
    _C.set_instruction_set(name)
    try:
        yield
    finally:
        _C.set_instruction_set(before)


class Rows:
    """The per-row arguments of a call, random but fixed, with every field open to change."""

    def __init__(self, rows: int, queries: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows, self.queries = rows, queries
        self.query_index = torch.randint(0, max(queries, 1), (rows,), generator=generator)
        self.query_id = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
        self.timestep = torch.randint(0, 65536, (rows,), generator=generator)
        self.sample = torch.randint(0, 65536, (rows,), generator=generator)
        self.x0_scale = torch.rand(rows, generator=generator)
        self.eps_scale = torch.rand(rows, generator=generator)
        self.weight = torch.rand(rows, dtype=torch.float64, generator=generator)

    def indices(self) -> dict[str, int]:
        names = ("query_index", "query_id", "timestep", "sample", "x0_scale", "eps_scale")
        pointers = {name: getattr(self, name).data_ptr() for name in names}
        return {"queries": self.queries, "rows": self.rows, **pointers}


def add_noise_arguments(
    out: torch.Tensor, x0: torch.Tensor, rows: Rows, seed: int = 7, antithetic: bool = False, threads: int = 1
) -> dict[str, Any]:
    return {
        "out": out.data_ptr(),
        "out_strides": out.stride(),
        "x0": x0.data_ptr(),
        "x0_strides": x0.stride(),
        "shape": list(x0.shape[1:]),
        "seed": seed,
        "antithetic": antithetic,
        "threads": threads,
        **rows.indices(),
    }


def add_noise(x0: torch.Tensor, rows: Rows, out: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """The result in `out`, which is filled with nan before: an element that is not written shows."""
    if out is None:
        out = torch.empty(rows.rows, *x0.shape[1:])
    out.fill_(torch.nan)
    _C.add_noise(**add_noise_arguments(out, x0, rows, **options))
    return out


def denoising_error_arguments(
    errors: torch.Tensor,
    paired: torch.Tensor | None,
    predictions: torch.Tensor,
    x0: torch.Tensor,
    rows: Rows,
    seed: int = 7,
    antithetic: bool = False,
    threads: int = 1,
) -> dict[str, Any]:
    return {
        "errors": errors.data_ptr(),
        "paired": 0 if paired is None else paired.data_ptr(),
        "predictions": predictions.data_ptr(),
        "prediction_strides": predictions.stride(),
        "dtype": str(predictions.dtype).removeprefix("torch."),
        "models": predictions.shape[0],
        "x0": x0.data_ptr(),
        "x0_strides": x0.stride(),
        "shape": list(x0.shape[1:]),
        "weight": rows.weight.data_ptr(),
        "seed": seed,
        "antithetic": antithetic,
        "threads": threads,
        **rows.indices(),
    }


def denoising_error(
    predictions: torch.Tensor, x0: torch.Tensor, rows: Rows, paired: bool = False, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    errors = torch.full((predictions.shape[0], rows.rows), torch.nan, dtype=torch.float64)
    differences = torch.full_like(errors, torch.nan) if paired else None
    _C.denoising_error(**denoising_error_arguments(errors, differences, predictions, x0, rows, **options))
    return errors, differences


def group_norm_silu_arguments(out: torch.Tensor, x: torch.Tensor, groups: int, threads: int = 1) -> dict[str, Any]:
    """Of channels-last (R, P, C) tensors, with a weight for each of two models."""
    rows, positions, channels = x.shape
    names = (
        "weight",
        "bias",
        "model_index",
        "addend",
        "scale",
        "shift",
        "addend_stride",
        "scale_stride",
        "shift_stride",
    )
    return {
        "out": out.data_ptr(),
        "out_strides": out.stride()[:2],
        "x": x.data_ptr(),
        "x_strides": x.stride()[:2],
        "dtype": str(x.dtype).removeprefix("torch."),
        "rows": rows,
        "positions": positions,
        "channels": channels,
        "groups": groups,
        "models": 2,
        "eps": 1e-5,
        "silu": True,
        "threads": threads,
        **dict.fromkeys(names, 0),
    }


def attention_arguments(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, threads: int = 1
) -> dict[str, Any]:
    """Of (rows, heads, positions, dim) tensors."""
    tensors = {"out": out, "q": q, "k": k, "v": v}
    rows, heads, queries, dim = q.shape
    return {
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        **{f"{name}_strides": tensor.stride()[:3] for name, tensor in tensors.items()},
        "dtype": str(q.dtype).removeprefix("torch."),
        "rows": rows,
        "heads": heads,
        "queries": queries,
        "keys": k.shape[2],
        "dim": dim,
        "scale": dim**-0.5,
        "threads": threads,
    }


def conv3x3_arguments(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, threads: int = 1
) -> dict[str, Any]:
    """Of (rows, channels, height, width) tensors whose channels lie next to each other."""
    rows, inputs, height, width = x.shape
    return {
        "out": out.data_ptr(),
        "out_strides": [out.stride(dim) for dim in (0, 2, 3)],
        "x": x.data_ptr(),
        "x_strides": [x.stride(dim) for dim in (0, 2, 3)],
        "weight": weight.data_ptr(),
        "bias": 0 if bias is None else bias.data_ptr(),
        "rows": rows,
        "height": height,
        "width": width,
        "inputs": inputs,
        "outputs": len(weight),
        "threads": threads,
    }
