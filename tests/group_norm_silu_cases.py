"""Inputs of `group_norm_silu`, and its rival: what a model does without it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from guda_fast import ops, reference


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def make(
    rows: int, channels: int, positions: tuple[int, ...], dtype: torch.dtype = torch.float32, offset: float = 0.5
) -> Tensor:
    random = torch.Generator().manual_seed(rows + 3 * channels)
    return channels_last((torch.randn(rows, channels, *positions, generator=random) * 2 + offset).to(dtype))


def make_vectors(rows: int, channels: int, models: int | None = None) -> dict[str, Tensor]:
    """Every optional tensor of the op."""
    random = torch.Generator().manual_seed(channels)
    per_row = {name: torch.randn(rows, channels, generator=random) for name in ("addend", "scale", "shift")}
    size = (channels,) if models is None else (models, channels)
    affine = {name: torch.randn(size, generator=random) for name in ("weight", "bias")}
    index = {} if models is None else {"model_index": torch.randint(models, (rows,), generator=random)}
    return {**per_row, **affine, **index}


def eager(x: Tensor, groups: int, eps: float = 1e-5, silu: bool = True, **vectors: Tensor) -> Tensor:
    """What a model does now, in x's dtype throughout."""
    column = (*x.shape[:2], *([1] * (x.dim() - 2)))
    given = {name: vector if name == "model_index" else vector.to(x.dtype) for name, vector in vectors.items()}
    index = given.get("model_index")
    h = x + given["addend"].view(column) if "addend" in given else x
    if index is None:
        y = torch.group_norm(h, groups, given.get("weight"), given.get("bias"), eps)
    else:
        y = torch.group_norm(h, groups, None, None, eps)
        y = y * given["weight"][index].view(column) + given["bias"][index].view(column)
    if "scale" in given:
        y = y * (1 + given["scale"].view(column)) + given["shift"].view(column)
    return F.silu(y) if silu else y


def assert_within_twice_eager(
    x: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    run: Callable[..., Tensor] = ops.group_norm_silu,
    **vectors: Tensor,
) -> None:
    """The largest and the root mean square error; one rounding of the result is granted where eager is exact."""
    vectors = {name: v if name == "model_index" else v.to(x.dtype) for name, v in vectors.items()}
    exact = reference.group_norm_silu(x, groups, eps=eps, silu=silu, **vectors, dtype=torch.float64)
    ours = run(x, groups, eps=eps, silu=silu, **vectors)
    assert ours.dtype == x.dtype
    error, rival = (ours.double() - exact).abs(), (eager(x, groups, eps, silu, **vectors).double() - exact).abs()
    rounding = torch.finfo(x.dtype).eps / 2 * exact.abs().max()
    assert float(error.max()) <= 2 * float(rival.max()) + rounding
    assert float(error.square().mean()) <= 4 * float(rival.square().mean()) + rounding**2
