"""Which rows of a batch a layer has to compute: one for each model, sample, timestep or condition that it can tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from guda_fast._validate import check_tensor
from guda_fast.diffusion.conditions import flat

Kind = frozenset[str]
"""The factors that something depends on, of FACTORS."""

FACTORS = ("model", "sample", "timestep", "condition")
_WHERE = "RowModels"


class Segment(NamedTuple):
    """Neighbouring rows of one model."""

    model: int
    rows: slice


class Selection:
    """The rows that stand for all rows of a batch where only some factors matter.

    rows: which of the batch's rows, None for all of them [(U,)]
    inverse: which of the selected rows each row of the batch takes, None where it is the row itself [(R,)]
    model: the model of each selected row; of one of those that share it, where the model does not matter [(U,)]
    """

    def __init__(self, first: np.ndarray[Any, Any], inverse: np.ndarray[Any, Any], model: np.ndarray[Any, Any]) -> None:
        self.count = len(first)
        self._all = len(first) == len(inverse)
        self._first, self._inverse, self._model = first, inverse, model
        self._tensors: dict[tuple[str, torch.device], Tensor] = {}

    def rows(self, device: torch.device) -> Tensor | None:
        return None if self._all else self._tensor("rows", self._first, device)

    def inverse(self, device: torch.device) -> Tensor | None:
        return None if self._all else self._tensor("inverse", self._inverse, device)

    def model(self, device: torch.device) -> Tensor:
        return self._tensor("model", self._model, device)

    def numbers(self, other: Selection) -> np.ndarray[Any, Any]:
        """Which row of another selection each row of this one takes [(U,)]."""
        numbers: np.ndarray[Any, Any] = other._inverse[self._first]
        return numbers

    @cached_property
    def segments(self) -> list[Segment]:
        """The models that have a row, one after another."""
        starts = np.flatnonzero(np.diff(self._model, prepend=-1)).tolist()
        models = self._model[starts].tolist()
        bounds = pairwise([*starts, self.count])
        return [Segment(model, slice(*bound)) for model, bound in zip(models, bounds, strict=True)]

    def offsets(self, models: int, device: torch.device) -> Tensor:
        """Where the segments of models 0, 1, ... begin and the last ends, empty ones too [(models + 1,)]."""
        bounds = np.searchsorted(self._model, np.arange(models + 1))
        return self._tensor(f"offsets {models}", bounds, device)

    def _tensor(self, name: str, values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
        if (name, device) not in self._tensors:
            self._tensors[name, device] = on_device(values, device)
        return self._tensors[name, device]


class RowModels:
    """The model of each row of a batch, and what rows have in common; on the host.

    model: 0 for the base, k + 1 for group k; any mixture in any order [(R,), integer]
    sample: rows with equal numbers have the same x and timestep [(R,), integer]
    timestep: rows with equal numbers have the same timestep [(R,), integer]
    condition: rows with equal numbers have the same prompt or class; None says nothing, so that no two rows share
        what depends on it [(R,), integer]

    Each is a sequence, a NumPy array or a tensor on the CPU. Raises TypeError or ValueError naming the argument.

    >>> len(RowModels(model=[0, 1, 1], sample=[7, 7, 8], timestep=[5, 5, 5]))
    3
    """

    def __init__(
        self,
        model: Sequence[int] | np.ndarray[Any, Any] | Tensor,
        sample: Sequence[int] | np.ndarray[Any, Any] | Tensor,
        timestep: Sequence[int] | np.ndarray[Any, Any] | Tensor,
        condition: Sequence[int] | np.ndarray[Any, Any] | Tensor | None = None,
    ) -> None:
        numbers = _column("model", model, None)
        if len(numbers) and numbers.min() < 0:
            raise ValueError(f"{_WHERE}: model must be 0 or more, got {numbers.min()}")
        rows = len(numbers)
        columns = {
            "model": numbers,
            "sample": _column("sample", sample, rows),
            "timestep": _column("timestep", timestep, rows),
            "condition": np.arange(rows) if condition is None else _column("condition", condition, rows),
        }
        self.highest = int(numbers.max(initial=0))
        self._order: np.ndarray[Any, Any] | None = None
        if (np.diff(numbers) < 0).any():
            self._order = np.argsort(numbers, kind="stable")
            columns = {name: column[self._order] for name, column in columns.items()}
        self._columns = columns
        self._selections: dict[Kind, Selection] = {}
        self._models: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self._columns["model"])

    def order(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The rows by model, and what undoes that; None where they come so [(R,) twice]."""
        if self._order is None:
            return None
        return on_device(self._order, device), on_device(np.argsort(self._order), device)

    def models(self, device: torch.device) -> Tensor:
        """The model of each row, in `order` [(R,)]."""
        if device not in self._models:
            self._models[device] = on_device(self._columns["model"], device)
        return self._models[device]

    def select(self, kind: Kind) -> Selection:
        """One row for each combination of the factors in ``kind``, by model; rows are numbered in `order`."""
        if kind not in self._selections:
            self._selections[kind] = self._select(kind)
        return self._selections[kind]

    def crosses(self, kind: Kind, models: int) -> bool:
        """Whether each of so many models has all rows that ``kind`` selects, in their order."""
        shared, apart = self.select(kind), self.select(kind | {"model"})
        if apart.count != models * shared.count:
            return False
        return bool((apart.numbers(shared).reshape(models, -1) == np.arange(shared.count)).all())

    def _select(self, kind: Kind) -> Selection:
        codes = np.zeros(len(self), dtype=np.int64)
        # A sample has one timestep.
        for factor in kind - {"timestep"} if "sample" in kind else kind:
            _, column = np.unique(self._columns[factor], return_inverse=True)
            # Numbered anew each time, so that the product stays below R squared.
            _, codes = np.unique(codes * len(self) + column, return_inverse=True)
        _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        # In the order of their first rows the selected ones are by model, since all rows are.
        by_row = np.argsort(first)
        position = np.empty_like(by_row)
        position[by_row] = np.arange(len(by_row))
        first = first[by_row]
        return Selection(first, position[inverse], self._columns["model"][first])


class Inputs(NamedTuple):
    """What a network takes; values of ``conditions``, by name, may be mappings and sequences of tensors."""

    x: Tensor
    timestep: Tensor
    conditions: Mapping[str, Any]

    def take(self, rows: Tensor) -> Inputs:
        """Some of the rows, in any order."""
        conditions = map_rows(lambda tensor: tensor[rows], len(self.x), self.conditions)
        return Inputs(self.x[rows], self.timestep[rows], conditions)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {"x": self.x, "timestep": self.timestep, **flat(self.conditions)}

    def run(self, model: Callable[..., Any]) -> Tensor:
        """The prediction, as diffusers' models give it; transformers take the prompt before the timestep."""
        result: Tensor = model(self.x, timestep=self.timestep, **self.conditions, return_dict=False)[0]
        return result


def map_rows(change: Callable[[Tensor], Tensor], rows: int, conditions: Any) -> Any:
    """The same conditions, with each tensor that has a row for each row of x changed."""
    if isinstance(conditions, Tensor):
        return change(conditions) if conditions.dim() and len(conditions) == rows else conditions
    if isinstance(conditions, Mapping):
        return {name: map_rows(change, rows, value) for name, value in conditions.items()}
    if isinstance(conditions, list | tuple):
        return type(conditions)(map_rows(change, rows, value) for value in conditions)
    return conditions


def on_device(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """A copy on the device that nobody waits for."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _column(name: str, values: Any, rows: int | None) -> np.ndarray[Any, Any]:
    if isinstance(values, Tensor):
        check_tensor(_WHERE, name, values, device=torch.device("cpu"))
        values = values.numpy()
    column = np.asarray(values)
    if column.size == 0:
        column = column.astype(np.int64)
    if column.dtype.kind not in "iu":
        raise TypeError(f"{_WHERE}: {name} must be integers, got {column.dtype}")
    if column.ndim != 1 or (rows is not None and len(column) != rows):
        raise ValueError(f"{_WHERE}: {name} must have shape ({'R' if rows is None else rows},), got {column.shape}")
    return column.astype(np.int64)
