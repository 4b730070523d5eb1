"""The batched plan: rows of many models in one forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from guda_fast._memory import free_bytes
from guda_fast.deltas import DeltaBank
from guda_fast.diffusion.schedule import FloatArray
from guda_fast.errors import BatchedUnavailableError
from guda_fast.forward._routing import Inputs, RowModels
from guda_fast.forward.batched import BatchedModel
from guda_fast.forward.batches import Advance, Batches
from guda_fast.forward.noised import NoisedQueries
from guda_fast.forward.rows import Rows


class BatchedPlan:
    """Runs rows in batches of whatever models they have, model by model as far as that fills batches.

    bank: holds its base, resident as for the swap plan. batches: rows a forward.
    example: one row like those of a run in all but its values.
    free: called before a batch that did not fit is tried again at half the size.
    Raises BatchedUnavailableError with the reason where the model or a delta does not allow it.
    """

    def __init__(
        self, bank: DeltaBank, batches: Batches, example: Inputs, free: Callable[[], None] = lambda: None
    ) -> None:
        _check_memory(bank)
        self.bank = bank
        self.free = free
        self.batches = batches
        self.model = BatchedModel(bank, example=example)

    @torch.inference_mode()
    def run(self, queries: NoisedQueries, rows: Rows, advance: Advance) -> FloatArray:
        """Weighted errors w_t e(t) of the rows, in their order [(R,), float64]; see `SwapPlan.run`."""
        order = rows.model.argsort(stable=True)
        ordered = rows[order]

        def forward(inputs: Inputs, numbers: Tensor) -> Tensor:
            part = ordered[numbers]
            models = RowModels(
                model=part.model,
                sample=part.query * queries.draws + part.draw,
                timestep=queries.timestep[part.draw],
                condition=queries.conditions.row[part.query],
            )
            return self.model(inputs.x, inputs.timestep, models, **inputs.conditions)

        query, draw = ordered.query.to(queries.device), ordered.draw.to(queries.device)
        found = self.batches.errors(queries, query, draw, forward, advance, self.free)
        queries.check_finite(found.numpy(), ordered, self.bank.groups)
        errors = torch.empty_like(found)
        errors[order] = found
        result: FloatArray = errors.numpy()
        return result


def _check_memory(bank: DeltaBank) -> None:
    """Raise BatchedUnavailableError where all groups' parameters, and a rehearsal in float64, might not fit."""
    place = next(bank.model.parameters())
    free = free_bytes(place.device)
    surveys = bank.survey().values()
    # Layers keep the factors there, and else merge small ones.
    factors = place.device.type == "cuda" or place.dtype.itemsize < 4
    if factors and all(survey.kind == "low-rank" for survey in surveys):
        changed = sum(survey.bytes for survey in surveys)
    else:
        changed = sum(survey.values for survey in surveys) * place.dtype.itemsize
    rehearsal = 4 * 8 * sum(parameter.numel() for parameter in bank.model.parameters())
    if free is not None and changed + rehearsal > free // 2:
        raise BatchedUnavailableError(
            f"the parameters of all groups take {changed / 2**30:.2f} GiB and their rehearsal "
            f"{rehearsal / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB is free, of which half may be used"
        )
