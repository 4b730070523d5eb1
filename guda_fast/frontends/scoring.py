"""What both frontends run: all images under the base and the models that there are, through the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from guda_fast.diffusion.schedule import FloatArray, IntArray
from guda_fast.forward import Advance, Engine, Rows
from guda_fast.forward.noised import NoisedQueries
from guda_fast.forward.rows import BASE

_ROWS = 2**21  # of one call to the engine: at about 128 bytes each, 256 MiB


@dataclass(frozen=True)
class ImageBatches:
    """The images of a run in the batches that a script would make, which noise may depend on.

    images: how many [N]. size: of a batch [>= 1].
    """

    images: int
    size: int

    def __iter__(self) -> Iterator[range]:
        for start in range(0, self.images, self.size):
            yield range(start, min(start + self.size, self.images))

    def tiles(self, draws: int) -> Iterator[range]:
        """Whole batches that follow each other, as many as one call to the engine should hold under one model."""
        step = self.size * max(1, _ROWS // (self.size * draws))
        for start in range(0, self.images, step):
            yield range(start, min(start + step, self.images))


def falling(draws: int) -> list[int]:
    """The draws from the highest timestep down, as the scripts go."""
    return list(range(draws))[::-1]


def errors_of_base(engine: Engine, queries: NoisedQueries, batches: ImageBatches, advance: Advance) -> None:
    """Compute the weighted errors of the base at all draws that ``queries.base_errors`` does not know yet."""
    for tile in batches.tiles(queries.draws):
        rows = _rows(batches, tile, queries.draws, [BASE])
        unknown = torch.from_numpy(np.isnan(queries.base_errors[rows.query, rows.draw])).nonzero().flatten()
        rows = rows[unknown]
        queries.base_errors[rows.query, rows.draw] = engine.errors(queries, rows, advance)


def score_images(engine: Engine, queries: NoisedQueries, batches: ImageBatches) -> FloatArray:
    """Scores of all images under all groups of the engine's bank [(N, K), float64].

    Each model goes through the rows of a tile before the next one is applied, and the base through its own once. Rows
    come batch of images by batch, the highest timestep first, which is the order that seeded noise is cheapest in.

    queries: of the engine; base errors that are known there are not computed again, the others are left there.
    """
    models, draws = len(engine.bank), queries.draws
    scores = np.empty((batches.images, models))
    known = int(np.isfinite(queries.base_errors).sum())
    total = (models + 1) * batches.images * draws - known
    with tqdm(total=total, desc="score", unit="forward", unit_scale=True, dynamic_ncols=True) as bar:

        def advance(forwards: int) -> None:
            bar.update(forwards)

        errors_of_base(engine, queries, batches, advance)
        for tile in batches.tiles(draws):
            at_once = max(1, _ROWS // (len(tile) * draws))
            for first in range(0, models, at_once):
                part = list(range(first, min(first + at_once, models)))
                rows = _rows(batches, tile, draws, [model + 1 for model in part])
                differences = np.empty((len(part), len(tile), draws))
                place = (rows.model - 1 - first, rows.query - tile.start, rows.draw)
                differences[place] = engine.differences(queries, rows, advance)
                scores[tile.start : tile.stop, part] = differences.sum(axis=2).T
    return scores


def _rows(batches: ImageBatches, tile: range, draws: int, models: list[int]) -> Rows:
    """Every draw of the images of a tile, batch by batch, from the highest timestep down, under each model."""
    query, draw = [], []
    order = torch.tensor(falling(draws))
    for start in range(tile.start, tile.stop, batches.size):
        images = torch.arange(start, min(start + batches.size, tile.stop))
        query.append(images.repeat(draws))
        draw.append(order.repeat_interleave(len(images)))
    rows = torch.cat(query), torch.cat(draw)
    count = len(rows[0])
    model = torch.tensor(models, dtype=torch.int64).repeat_interleave(count)
    return Rows(rows[0].repeat(len(models)), model, rows[1].repeat(len(models)))


def check_rows(engine: Engine, queries: NoisedQueries, draw: IntArray) -> FloatArray:
    """Errors of the base at one draw of each image [(N,), float64]; draw: [(N,), int64]."""
    count = len(draw)
    rows = Rows(torch.arange(count), torch.full((count,), BASE), torch.from_numpy(draw))
    return engine.errors(queries, rows)
