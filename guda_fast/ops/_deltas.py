"""What both delta ops take beside the layer: their validation, and the reasons against the Triton backend."""

from __future__ import annotations

import torch
from torch import Tensor

from guda_fast._backends import triton_device_reason
from guda_fast._validate import check_index_range, check_tensor
from guda_fast.reference.segments import Deltas

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_bias(where: str, bias: Tensor | None, weight: Tensor) -> None:
    if bias is not None:
        check_tensor(where, "bias", bias, shape=weight.shape[:1], dtypes=(weight.dtype,), device=weight.device)


def check_deltas(
    where: str,
    weight: Tensor,
    delta: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    bias_delta: Tensor | None,
) -> Deltas:
    """Check the K deltas of a layer: one form of weight delta or none, a bias delta or none, K in each."""
    if (up is None) != (down is None):
        raise ValueError(f"{where}: up and down must be given together, got only {'down' if up is None else 'up'}")
    if delta is not None and up is not None:
        raise ValueError(f"{where}: delta must be None where up and down are given, got both forms")
    number, rank = None, None
    shapes = {
        "delta": (None, *weight.shape),
        "up": (None, weight.shape[0], None),
        "bias_delta": (None, weight.shape[0]),
    }
    for name, tensor in (("delta", delta), ("up", up), ("down", down), ("bias_delta", bias_delta)):
        if tensor is None:
            continue
        shape = (None, rank, *weight.shape[1:]) if name == "down" else shapes[name]
        check_tensor(where, name, tensor, shape=(number, *shape[1:]), dtypes=(weight.dtype,), device=weight.device)
        number = tensor.shape[0]
        if name == "up":
            rank = tensor.shape[2]
            if rank < 1:
                raise ValueError(f"{where}: up must have a rank of at least 1, got shape {tuple(tensor.shape)}")
    if number is None:
        raise ValueError(f"{where}: delta, up and down, or bias_delta must be given, got none of them")
    return Deltas(delta, up, down, bias_delta)


def check_segments(
    where: str, deltas: Deltas, offsets: Tensor | None, delta_index: Tensor | None, device: torch.device
) -> int:
    """Check shapes and dtypes of what places rows and deltas; return the number of models."""
    models = deltas.number
    if delta_index is not None:
        check_tensor(where, "delta_index", delta_index, shape=(None,), dtypes=(torch.int64,), device=device)
        models = delta_index.shape[0]
    if offsets is not None:
        check_tensor(where, "offsets", offsets, shape=(models + 1,), dtypes=(torch.int64,), device=device)
    return models


def check_segment_values(
    where: str, rows: int, deltas: Deltas, offsets: Tensor | None, delta_index: Tensor | None
) -> None:
    """Check the values of offsets and indices on the CPU; elsewhere that would synchronise."""
    if delta_index is not None:
        check_index_range(where, "delta_index", delta_index, deltas.number - 1, low=-1)
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


def triton_reason(x: Tensor, *others: Tensor | None) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None."""
    if x.dtype == torch.float64:
        return "x is float64, and triton computes in float32"
    if any(tensor is not None and tensor.is_neg() for tensor in (x, *others)):
        return "an argument is a lazily negated view, whose memory holds the opposite values"
    return triton_device_reason(x.device)
