"""Rows in model segments, and the deltas that they take: shared by the definitions of the delta ops."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Deltas(NamedTuple):
    """K differences to one layer: of its weight, dense or low-rank (or neither), and of its bias."""

    dense: Tensor | None  # (K, O, *I)
    up: Tensor | None  # (K, O, r)
    down: Tensor | None  # (K, r, *I)
    bias: Tensor | None  # (K, O)

    @property
    def number(self) -> int:
        return next(tensor.shape[0] for tensor in self if tensor is not None)

    def to(self, dtype: torch.dtype) -> Deltas:
        return Deltas(*(None if tensor is None else tensor.to(dtype) for tensor in self))

    def merged(self, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor | None]:
        """The layer with dense delta k in it, or as it is where k is -1; one rounding to its dtype."""
        if k < 0:
            return weight, bias
        if self.dense is not None:
            weight = weight + self.dense[k]
        if self.bias is not None:
            bias = self.bias[k] if bias is None else bias + self.bias[k]
        return weight, bias

    def stacked(self, weight: Tensor, bias: Tensor | None, index: list[int]) -> tuple[Tensor, Tensor | None]:
        """The layers of all models as one layer of M * O outputs."""
        layers = [self.merged(weight, bias, k) for k in index]
        weights = torch.cat([weight for weight, _ in layers])
        if bias is None and self.bias is None:
            return weights, None
        zero = weight.new_zeros(weight.shape[0])
        return weights, torch.cat([zero if bias is None else bias for _, bias in layers])


class Segment(NamedTuple):
    """The rows of one model, and the delta that it takes; -1 is none."""

    rows: slice
    delta: int


def segments(offsets: Tensor, index: list[int], row_size: int = 1) -> list[Segment]:
    """The segments that hold any row; row_size: how many rows of the result each row stands for.

    Reads the offsets on the host: on a device that synchronises.
    """
    bounds = pairwise(row_size * offset for offset in offsets.tolist())
    return [Segment(slice(*bound), k) for bound, k in zip(bounds, index, strict=True) if bound[0] < bound[1]]


def indices(delta_index: Tensor | None, deltas: Deltas) -> list[int]:
    """Which delta each model takes, on the host; model m takes delta m where nothing is said."""
    return list(range(deltas.number)) if delta_index is None else delta_index.tolist()
