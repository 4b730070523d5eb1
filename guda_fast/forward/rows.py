"""The unit of work of a forward: one query at one draw under one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from guda_fast._validate import check_index_range, check_tensor

BASE = 0
"""The model number of the base; the counterfactual of group k has k + 1."""


@dataclass(frozen=True, eq=False)
class Rows:
    """An arbitrary list of (query, model, draw) rows, in the caller's order.

    query: which of the queries [(R,), int64, on the CPU]
    model: 0 is the base, k + 1 the counterfactual of group k [(R,), int64, on the CPU]
    draw: which of the protocol's draws [(R,), int64, on the CPU]

    >>> rows = Rows.product(queries=1, models=[0, 2], draws=2)
    >>> rows.model.tolist(), rows.draw.tolist()
    ([0, 0, 2, 2], [0, 1, 0, 1])
    """

    query: Tensor
    model: Tensor
    draw: Tensor

    @staticmethod
    def product(queries: int, models: list[int], draws: int) -> Rows:
        """Every draw of every query under each of the models; draws innermost, models outermost."""
        model, query, draw = torch.meshgrid(
            torch.tensor(models, dtype=torch.int64), torch.arange(queries), torch.arange(draws), indexing="ij"
        )
        return Rows(query.flatten(), model.flatten(), draw.flatten())

    def __len__(self) -> int:
        return len(self.query)

    def __getitem__(self, index: Tensor) -> Rows:
        return Rows(self.query[index], self.model[index], self.draw[index])

    def by_model(self) -> Iterator[tuple[int, Tensor]]:
        """Each model that has rows, from the base on, with the positions of its rows in their order."""
        order = self.model.argsort(stable=True)
        models, counts = self.model[order].unique_consecutive(return_counts=True)
        yield from zip(models.tolist(), order.split(counts.tolist()), strict=True)

    def check(self, queries: int, models: int, draws: int) -> None:
        """Raise TypeError or ValueError where a row is not of these queries, models and draws."""
        for field, count in zip(fields(self), (queries, models, draws), strict=True):
            index = getattr(self, field.name)
            shape = (None,) if field.name == "query" else self.query.shape
            check_tensor("Rows", field.name, index, shape=shape, dtypes=(torch.int64,), device=torch.device("cpu"))
            check_index_range("Rows", field.name, index, count - 1)
