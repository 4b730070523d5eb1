"""The full estimator: every draw of every cell, hence the protocol's exact score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from guda_fast._validate import check_int
from guda_fast.datasets.queries import QuerySet
from guda_fast.diffusion import Protocol
from guda_fast.estimators.cells import Cells, standard_error, std_error_kind
from guda_fast.forward import Advance, Engine, Rows

_BYTES_A_ROW = 128  # three indices and an error, and their copies in the order of the models


@dataclass(frozen=True)
class Full:
    """Evaluates all draws: (K + 1) N D forwards, no sampling error with respect to the protocol.

    tile_bytes: memory for the queries of a tile and its rows; each delta is applied once a tile [>= 1].
    """

    tile_bytes: int = 2**28

    def __post_init__(self) -> None:
        check_int("Full", "tile_bytes", self.tile_bytes, 1)

    def forwards(self, queries: int, groups: int, protocol: Protocol) -> int:
        """Forwards of one row each that a run takes."""
        return (groups + 1) * queries * protocol.draws

    def run(self, engine: Engine, queries: QuerySet, advance: Advance) -> Cells:
        """Scores of the distinct queries, tile by tile; see ``guda_fast.attribute``."""
        protocol, models = engine.protocol, list(range(1, len(engine.bank) + 1))
        count, draws, names = len(queries.x0), protocol.draws, queries.distinct_names
        cells = Cells(
            scores=np.empty((count, len(models))),
            std_error=np.empty((count, len(models))),
            std_error_kind=std_error_kind(protocol),
            base_errors=np.empty((count, draws)),
        )
        for tile in self._tiles(queries, len(models) + 1, draws):
            noised = engine.queries(
                queries.x0[tile], queries.ids[tile], names[tile], conditions=queries.conditions[tile]
            )
            rows = Rows.product(len(noised.x0), models, draws)
            differences = engine.differences(noised, rows, advance).reshape(len(models), -1, draws)
            cells.base_errors[tile] = noised.base_errors
            cells.scores[tile] = differences.sum(axis=2).T
            for k, difference in enumerate(differences):
                cells.std_error[tile, k] = standard_error(difference, protocol)
        return cells

    def _tiles(self, queries: QuerySet, models: int, draws: int) -> Iterator[slice]:
        x0 = queries.x0
        bytes_a_query = x0[0].nbytes + queries.conditions.bytes_a_row + models * draws * _BYTES_A_ROW
        size = max(1, self.tile_bytes // bytes_a_query)
        for start in range(0, len(x0), size):
            yield slice(start, start + size)
