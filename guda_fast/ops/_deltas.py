"""What both delta ops share: their arguments, the validation of all but the layer, and their backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guda_fast._backends import Backend, triton_device_reason, triton_unavailable
from guda_fast._validate import check_index_range, check_tensor
from guda_fast.reference.delta_conv2d import Window
from guda_fast.reference.segments import Deltas

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Arguments(NamedTuple):
    """The tensors that both ops, their definitions and their launchers take, in this order."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    offsets: Tensor | None = None
    delta: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    bias_delta: Tensor | None = None
    delta_index: Tensor | None = None


class Request(NamedTuple):
    """A validated call; a linear layer is a window of one pixel."""

    tensors: Arguments
    models: int
    window: Window = Window()

    @property
    def device(self) -> torch.device:
        return self.tensors.x.device


def check_shapes(where: str, tensors: Arguments) -> int:
    """Check all that goes with a checked weight: types, shapes, dtypes, devices; return the number of models."""
    weight, bias, offsets, index = tensors.weight, tensors.bias, tensors.offsets, tensors.delta_index
    if bias is not None:
        check_tensor(where, "bias", bias, shape=weight.shape[:1], dtypes=(weight.dtype,), device=weight.device)
    models = _check_deltas(where, tensors)
    if index is not None:
        check_tensor(where, "delta_index", index, shape=(None,), dtypes=(torch.int64,), device=weight.device)
        models = index.shape[0]
    if models == 0 and offsets is not None and tensors.x.shape[0] > 0:
        raise ValueError(f"{where}: delta_index must have a model for the {tensors.x.shape[0]} rows of x, got none")
    if offsets is not None:
        check_tensor(where, "offsets", offsets, shape=(models + 1,), dtypes=(torch.int64,), device=weight.device)
    return models


def _check_deltas(where: str, tensors: Arguments) -> int:
    """One form of weight delta or none, a bias delta or none, K in each; return K."""
    weight, up, down = tensors.weight, tensors.up, tensors.down
    if (up is None) != (down is None):
        raise ValueError(f"{where}: up and down must be given together, got only {'down' if up is None else 'up'}")
    if tensors.delta is not None and up is not None:
        raise ValueError(f"{where}: delta must be None where up and down are given, got both forms")
    number: int | None = None
    rank: int | None = None
    for name, shape in (
        ("delta", weight.shape),
        ("up", (weight.shape[0], None)),
        ("down", (None, *weight.shape[1:])),
        ("bias_delta", weight.shape[:1]),
    ):
        tensor = getattr(tensors, name)
        if tensor is None:
            continue
        wanted = (number, rank, *shape[1:]) if name == "down" else (number, *shape)
        check_tensor(where, name, tensor, shape=wanted, dtypes=(weight.dtype,), device=weight.device)
        number = tensor.shape[0]
        if name == "up":
            rank = tensor.shape[2]
            if rank < 1:
                raise ValueError(f"{where}: up must have a rank of at least 1, got shape {tuple(tensor.shape)}")
    if number is None:
        raise ValueError(f"{where}: delta, up and down, or bias_delta must be given, got none of them")
    return number


def check_values(where: str, tensors: Arguments) -> None:
    """Check the values of offsets and indices on the CPU; elsewhere that would synchronise."""
    offsets, index, rows = tensors.offsets, tensors.delta_index, tensors.x.shape[0]
    if index is not None:
        deltas = Deltas(tensors.delta, tensors.up, tensors.down, tensors.bias_delta)
        check_index_range(where, "delta_index", index, deltas.number - 1, low=-1)
    if offsets is None or offsets.device.type != "cpu":
        return
    if offsets[0] != 0 or offsets[-1] != rows:
        raise ValueError(
            f"{where}: offsets must run from 0 to the {rows} rows of x, got {int(offsets[0])} to {int(offsets[-1])}"
        )
    falls = (offsets.diff() < 0).nonzero()
    if falls.numel():
        m = int(falls[0])
        raise ValueError(
            f"{where}: offsets must not fall, got {int(offsets[m])} then {int(offsets[m + 1])} at segment {m}"
        )


def tf32_allowed(switch: Any) -> bool:
    """Whether float32 products may be rounded to TF32: `torch.backends.cuda.matmul`, or those of convolutions.

    Since torch 2.9 there are two ways to say so, and the old one raises where the new one was used.
    """
    return bool(switch.fp32_precision == "tf32" if hasattr(switch, "fp32_precision") else switch.allow_tf32)


def _triton_reason(request: Request) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None."""
    if request.tensors.x.dtype == torch.float64:
        return "x is float64, and triton computes in float32"
    if any(tensor is not None and tensor.is_neg() for tensor in request.tensors):
        return "an argument is a lazily negated view, whose memory holds the opposite values"
    return triton_device_reason(request.device)


def backends(
    run_reference: Callable[[Request], Tensor], run_triton: Callable[[Request], Tensor]
) -> Mapping[str, tuple[Backend[Request, Tensor], ...]]:
    """The table of either op."""
    reference = Backend("reference", run_reference)
    triton = Backend("triton", run_triton, _triton_reason, triton_unavailable)
    return {"cuda": (triton, reference), "cpu": (reference, triton), "*": (reference,)}
