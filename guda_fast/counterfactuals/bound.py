"""How much worse a run makes what it should keep: its retain loss against the base's, on the same draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from guda_fast.counterfactuals.frozen import inputs_of
from guda_fast.counterfactuals.objective import HasBoundRows, Objective, Rows
from guda_fast.counterfactuals.students import forward
from guda_fast.diffusion.conditions import Conditions

_DRAWS = 8
# Of draws that no run is trained on, as far as seeds are small.
_SEED = 0x5EED_0F_B0


class RetainBound:
    """The mean squared error of a model on a few batches of retain rows that are drawn once.

    They are an objective's ``bound_rows`` where it has them, and else the retain rows of its batches.

    conditions: of the objective, on the device of the models. seed: of the run.

    Raises ValueError where retain rows have no target but what the base predicts: its loss on them is 0.
    """

    def __init__(self, objective: Objective, conditions: Conditions | None, base: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed((seed + _SEED) % 2**63)
        self._rows = [_rows(objective, generator) for _ in range(_DRAWS)]
        self._targets = [_own_target(rows) for rows in self._rows]
        self._conditions = conditions
        self._base = self.loss(base)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Of a model in eval mode."""
        parameter = next(model.parameters())
        errors = []
        for rows, target in zip(self._rows, self._targets, strict=True):
            placed = rows.to(parameter.device, parameter.dtype)
            error = forward(model, inputs_of(placed, self._conditions)) - target.to(placed.x_t)
            errors.append(error.double().square().mean().item())
        return sum(errors) / len(errors)

    def ratio(self, model: nn.Module) -> float:
        """The loss of a model as a multiple of the base's."""
        loss = self.loss(model)
        return loss / self._base if self._base > 0 else math.inf if loss > 0 else 1.0


def _rows(objective: Objective, generator: torch.Generator) -> Rows:
    if isinstance(objective, HasBoundRows):
        return objective.bound_rows(generator)
    return objective.draw(generator).retain


def _own_target(rows: Rows) -> Tensor:
    target = rows.target if rows.true is None else rows.true
    if isinstance(target, Tensor):
        return target
    raise ValueError(
        "train: retain_bound must be None where all that retain rows aim at is the base's prediction, got a bound"
    )
