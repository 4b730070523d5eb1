"""Rows in model segments, and the deltas that they take: shared by the definitions of the delta ops."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Below so many rows a model, making the sum of weight and dense delta costs more than a second product.
MERGE_ROWS = 16
# A branch of rank r costs rows * r * (inputs + outputs), making its weight r * inputs * outputs. Measured, the latter
# pays from eight times as much work on, for a product for all rows is faster than one a model.
MERGE_WORK = 8


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
        """The layer with delta k in it, or as it is where k is -1; one rounding of a dense delta to its dtype."""
        if k < 0:
            return weight, bias
        if self.dense is not None:
            weight = weight + self.dense[k]
        elif self.up is not None and self.down is not None:
            weight = weight + (self.up[k] @ self.down[k].flatten(1)).view_as(weight)
        if self.bias is not None:
            bias = self.bias[k] if bias is None else bias + self.bias[k]
        return weight, bias

    def merging_pays(self, weight: Tensor, rows: int) -> bool:
        """Whether models of so many rows had better make their weight than take the base's result and a branch's.

        Below 32 bits that is no matter of speed: a dense delta is merged, since the sum is rounded once, and factors
        stay factors, since rounding the sum may erase them.
        """
        if self.dense is not None:
            return weight.dtype.itemsize < 4 or rows >= MERGE_ROWS
        inputs, outputs = weight[0].numel(), weight.shape[0]
        work = MERGE_WORK * outputs * inputs
        return self.up is not None and weight.dtype.itemsize >= 4 and rows * (outputs + inputs) >= work


class Segment(NamedTuple):
    """The rows of one model, where their results go, and the delta that it takes; -1 is none."""

    rows: slice
    to: slice
    delta: int


def segments(offsets: Tensor | None, index: list[int], rows: int, row_size: int = 1) -> list[Segment]:
    """The segments that hold any row; without offsets each model takes all rows, and its results follow the last's.

    Reads the offsets on the host: on a device that synchronises.

    rows: of the input; row_size: how many rows of the result each of them stands for
    """
    if offsets is None:
        size = rows * row_size
        return [Segment(slice(0, size), slice(m * size, (m + 1) * size), k) for m, k in enumerate(index) if size]
    bounds = [slice(*bound) for bound in pairwise(row_size * offset for offset in offsets.tolist())]
    return [Segment(part, part, k) for part, k in zip(bounds, index, strict=True) if part.start < part.stop]


def indices(delta_index: Tensor | None, deltas: Deltas) -> list[int]:
    """Which delta each model takes, on the host; model m takes delta m where nothing is said."""
    return list(range(deltas.number)) if delta_index is None else delta_index.tolist()
