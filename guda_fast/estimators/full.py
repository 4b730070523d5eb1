"""The full estimator: every draw of every cell, hence the protocol's exact score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guda_fast._validate import check_int
from guda_fast.datasets.queries import QuerySet
from guda_fast.diffusion import Protocol
from guda_fast.diffusion.schedule import FloatArray
from guda_fast.estimators.cells import Cells, standard_error, std_error_kind
from guda_fast.forward import SwapPlan

Advance = Callable[[int], None]
"""Called with the number of forwards just done; raises to stop."""


@dataclass(frozen=True)
class Full:
    """Evaluates all draws: (K + 1) N D forwards, no sampling error with respect to the protocol.

    tile_bytes: memory for the queries of a tile and their errors; each delta is applied once a tile [>= 1].
    """

    tile_bytes: int = 2**28

    def __post_init__(self) -> None:
        check_int("Full", "tile_bytes", self.tile_bytes, 1)

    def forwards(self, queries: int, groups: int, protocol: Protocol) -> int:
        """Forwards of one row each that a run takes."""
        return (groups + 1) * queries * protocol.draws

    def run(self, plan: SwapPlan, queries: QuerySet, protocol: Protocol, advance: Advance) -> Cells:
        """Scores of the distinct queries, tile by tile; see ``guda_fast.attribute``."""
        groups = plan.bank.groups
        count, draws = len(queries.x0), protocol.draws
        cells = Cells(
            scores=np.empty((count, len(groups))),
            std_error=np.empty((count, len(groups))),
            std_error_kind=std_error_kind(protocol),
            base_errors=np.empty((count, draws)),
        )
        ids = torch.from_numpy(np.array(queries.ids, dtype=np.uint64).view(np.int64))
        for tile in self._tiles(queries.x0, draws):
            rows = _Rows(
                x0=queries.x0[tile].to(plan.device, plan.dtype),
                ids=ids[tile].to(plan.device),
                names=queries.distinct_names[tile],
                draws=draws,
            )
            base = _errors(plan, None, rows, advance)
            cells.base_errors[tile] = base
            for k, group in enumerate(groups):
                difference = _errors(plan, group, rows, advance) - base
                cells.scores[tile, k] = difference.sum(axis=1)
                cells.std_error[tile, k] = standard_error(difference, protocol)
        return cells

    def _tiles(self, x0: Tensor, draws: int) -> Iterator[slice]:
        bytes_a_query = x0[0].nbytes + 3 * draws * np.dtype(np.float64).itemsize
        size = max(1, self.tile_bytes // bytes_a_query)
        for start in range(0, len(x0), size):
            yield slice(start, start + size)


@dataclass(frozen=True, eq=False)
class _Rows:
    """All draws of the queries of a tile, draws innermost."""

    x0: Tensor
    ids: Tensor
    names: tuple[str, ...]
    draws: int

    def __len__(self) -> int:
        return len(self.x0) * self.draws


def _errors(plan: SwapPlan, group: str | None, rows: _Rows, advance: Advance) -> FloatArray:
    """Weighted errors of every draw of every query of a tile under one model [(N, D), float64]."""
    flat = np.empty(len(rows))
    with plan.model(group) as model:
        for start in range(0, len(rows), plan.batch_size):
            index = torch.arange(start, min(start + plan.batch_size, len(rows)))
            batch = plan.errors(model, rows.x0, rows.ids, index // rows.draws, index % rows.draws)
            flat[start : start + len(batch)] = batch
            advance(len(batch))
    errors: FloatArray = flat.reshape(len(rows.x0), rows.draws)
    finite = np.isfinite(errors)
    if not finite.all():
        query, draw = np.argwhere(~finite)[0]
        name = "the base" if group is None else f"group {group!r}"
        raise FloatingPointError(
            f"attribute: errors must be finite, got {errors[query, draw]} from {name} "
            f"for query {rows.names[query]} at draw {draw}"
        )
    return errors
