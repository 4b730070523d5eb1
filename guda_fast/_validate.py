"""Argument checks. Every message reads ``where: argument must be X, got Y``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real

import torch

INT64_MAX = 2**63 - 1


def describe(value: object) -> str:
    """A short description of ``value`` for an error message."""
    if isinstance(value, torch.Tensor):
        return f"{_dtype_name(value.dtype)} tensor of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    if len(text) > 80:
        text = text[:77] + "..."
    return text if isinstance(value, str) else f"{text} ({type(value).__name__})"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(
    where: str,
    name: str,
    value: object,
    *,
    shape: Sequence[int | None] | None = None,
    min_dim: int | None = None,
    max_dim: int | None = None,
    dtypes: Collection[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Check type, then shape (None matches any size), then dtype, then device; return the tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{where}: {name} must be a torch.Tensor, got {describe(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{where}: {name} must be a dense tensor, got one of layout {value.layout}")
    if min_dim is not None and value.dim() < min_dim:
        raise ValueError(f"{where}: {name} must have at least {min_dim} dimensions, got {describe(value)}")
    if max_dim is not None and value.dim() > max_dim:
        raise ValueError(f"{where}: {name} must have at most {max_dim} dimensions, got {describe(value)}")
    if shape is not None and value.shape != shape and not _shape_matches(value.shape, shape):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        wanted = f"({wanted},)" if len(shape) == 1 else f"({wanted})"
        raise ValueError(f"{where}: {name} must have shape {wanted}, got {describe(value)}")
    if dtypes is not None and value.dtype not in dtypes:
        wanted = " or ".join(_dtype_name(dtype) for dtype in dtypes)
        raise TypeError(f"{where}: {name} must be {wanted}, got {describe(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{where}: {name} must be on {device}, got {describe(value)}")
    return value


def _shape_matches(actual: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(actual) == len(wanted) and all(
        size is None or size == found for found, size in zip(actual, wanted, strict=True)
    )


def check_index_range(where: str, name: str, value: torch.Tensor, high: int, low: int = 0) -> None:
    """Check that an integer vector on the CPU lies in [low, high]; elsewhere a check would synchronise."""
    if value.device.type != "cpu" or value.numel() == 0:
        return
    least, most = value.aminmax()
    if least >= low and most <= high:
        return
    row = int(((value < low) | (value > high)).nonzero()[0])
    raise ValueError(f"{where}: {name} must be in [{low}, {high + 1}), got {int(value[row])} at row {row}")


def check_output(
    where: str, name: str, value: object, *, shape: Sequence[int], inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Check an output tensor: shape, the first input's dtype and device, and no memory shared with any input."""
    like = next(iter(inputs.values()))
    tensor = check_tensor(where, name, value, shape=shape, dtypes=(like.dtype,), device=like.device)
    if _overlaps_itself(tensor):
        raise ValueError(f"{where}: {name} must not overlap itself, got strides {tensor.stride()}")
    first, last = _byte_range(tensor)
    for other, source in inputs.items():
        source_first, source_last = _byte_range(source)
        if tensor.numel() and source.numel() and first < source_last and source_first < last:
            raise ValueError(f"{where}: {name} must not share memory with {other}, got overlapping addresses")
    return tensor


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """True unless each stride steps over all that the smaller ones reach."""
    reach = 0
    if tensor.numel() == 0:
        return False
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of a tensor, and the byte past its last."""
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_bool(where: str, name: str, value: object) -> bool:
    """Check that ``value`` is True or False; return it."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be a bool, got {describe(value)}")
    return value


def check_int(where: str, name: str, value: object, low: int, high: int = INT64_MAX) -> int:
    """Check that ``value`` is an integer (no bool) in [low, high]; return it as an int."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{where}: {name} must be an integer, got {describe(value)}")
    number = int(value)
    if not low <= number <= high:
        limit = f"at least {low}" if high == INT64_MAX else f"between {low} and {high}"
        raise ValueError(f"{where}: {name} must be {limit}, got {number}")
    return number


def check_real(where: str, name: str, value: object, low: float, high: float = math.inf) -> float:
    """Check that ``value`` is a finite real number in [low, high]; return it as a float."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{where}: {name} must be a real number, got {describe(value)}")
    number = float(value)
    if not (math.isfinite(number) and low <= number <= high):
        limit = f"finite and at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{where}: {name} must be {limit}, got {number!r}")
    return number


def check_choice(where: str, name: str, value: object, choices: Collection[str]) -> str:
    """Check that ``value`` is one of ``choices``; return it."""
    if value not in choices:
        wanted = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{where}: {name} must be one of {wanted}, got {describe(value)}")
    return str(value)
