"""The swap plan: one resident model that each delta is written into in turn."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from guda_fast.deltas import DeltaBank
from guda_fast.diffusion.schedule import FloatArray
from guda_fast.forward._routing import Inputs
from guda_fast.forward.batches import Advance, Batches
from guda_fast.forward.noised import NoisedQueries
from guda_fast.forward.resident import ResidentForward
from guda_fast.forward.rows import BASE, Rows


class SwapPlan:
    """Runs rows model by model, in batches, through the bank's resident model.

    Every batch has the same shape, but for a model's last one, which is padded with its own first row: base and
    counterfactual run alike, and their rounding cancels.

    bank: resident on the device and in the dtype of the run, in channels-last. batches: rows a forward.
    compiled: run the resident model through torch.compile.
    """

    def __init__(self, bank: DeltaBank, batches: Batches, *, compiled: bool = False) -> None:
        self.bank = bank
        self.batches = batches
        self.forward = ResidentForward(bank.model, compiled=compiled)

    def run(self, queries: NoisedQueries, rows: Rows, advance: Advance) -> FloatArray:
        """Weighted errors w_t e(t) of the rows, in their order [(R,), float64].

        advance: called after every batch with its rows; when it raises, the base is resident again.
        Raises FloatingPointError, naming group, query and draw, where an error is NaN or infinite.
        """
        errors = np.empty(len(rows))
        work = list(rows.by_model())
        following = [model for model, _ in work[1:]]
        try:
            for (model, index), next_model in zip_longest(work, following):
                self._make_resident(model)
                if next_model is not None:
                    self.bank.prefetch(next_model - 1)
                own = rows[index]
                errors[index.numpy()] = found = self._errors(queries, own, advance)
                queries.check_finite(found, own, self.bank.groups)
        finally:
            if self.bank.applied_group is not None:
                self.bank.restore()
        return errors

    def _make_resident(self, model: int) -> None:
        if model != BASE:
            self.bank.apply(model - 1)
        elif self.bank.applied_group is not None:
            self.bank.restore()

    @torch.inference_mode()
    def _errors(self, queries: NoisedQueries, rows: Rows, advance: Advance) -> FloatArray:
        """Errors of one model's rows."""
        query, draw = rows.query.to(queries.device), rows.draw.to(queries.device)

        def forward(inputs: Inputs, numbers: Tensor) -> Tensor:
            return self.forward(inputs)

        free = self.forward.forget_graphs
        errors: FloatArray = self.batches.errors(queries, query, draw, forward, advance, free).numpy()
        return errors
