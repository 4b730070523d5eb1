"""The batched plan: rows of many models in one forward."""

from __future__ import annotations

import torch
from torch import Tensor

from guda_fast.deltas import DeltaBank
from guda_fast.diffusion.schedule import FloatArray
from guda_fast.forward._routing import RowModels
from guda_fast.forward.batched import BatchedModel
from guda_fast.forward.batches import Advance, Batches
from guda_fast.forward.noised import NoisedQueries
from guda_fast.forward.rows import BASE, Rows
from guda_fast.forward.swap import example


class BatchedPlan:
    """Runs rows in batches of whatever models they have, model by model as far as that fills batches.

    bank: holds its base, resident as for the swap plan. batches: rows a forward. shape: of one query (C, H, W).
    Raises BatchedUnavailableError with the reason where the model or a delta does not allow it.
    """

    name = "batched"

    def __init__(self, bank: DeltaBank, batches: Batches, shape: tuple[int, ...]) -> None:
        self.bank = bank
        self.batches = batches
        self.shape = shape
        self.model = BatchedModel(bank, example=(*example(bank.model, shape, 1), {}))

    @torch.inference_mode()
    def run(self, queries: NoisedQueries, rows: Rows, advance: Advance) -> FloatArray:
        """Weighted errors w_t e(t) of the rows, in their order [(R,), float64]; see `SwapPlan.run`."""
        order = rows.model.argsort(stable=True)
        ordered = rows[order]

        def forward(x_t: Tensor, timestep: Tensor, numbers: Tensor) -> Tensor:
            part = ordered[numbers]
            models = RowModels(
                model=part.model,
                sample=part.query * queries.draws + part.draw,
                timestep=queries.timestep[part.draw],
            )
            return self.model(x_t, timestep, models)

        query, draw = ordered.query.to(queries.device), ordered.draw.to(queries.device)
        found = self.batches.errors(queries, query, draw, forward, advance)
        errors = torch.empty_like(found)
        errors[order] = found
        for model, index in rows.by_model():
            name = "the base" if model == BASE else f"group {self.bank.groups[model - 1]!r}"
            queries.check_finite(errors[index].numpy(), rows.query[index], rows.draw[index], name)
        result: FloatArray = errors.numpy()
        return result

    @torch.inference_mode()
    def try_forward(self, size: int, models: int) -> Tensor:
        """One forward of ``size`` rows, evenly of the first ``models`` models, for measuring."""
        x_t, timestep = example(self.bank.model, self.shape, size)
        model = torch.arange(size) * models // size
        sample = torch.arange(size) - torch.searchsorted(model, model)
        return self.model(x_t, timestep, RowModels(model=model, sample=sample, timestep=torch.zeros_like(model)))
