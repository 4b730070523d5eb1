"""The frozen base: what it predicts is the target of distillation, ESD and redirection."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from guda_fast.counterfactuals.objective import FromBase, Rows
from guda_fast.counterfactuals.students import Inputs, concatenated, forward
from guda_fast.diffusion.conditions import Conditions


class FrozenBase:
    """The base in eval mode without gradients, made when it is first asked.

    model: stays as it is, and must until the runs have ended: its weights are shared. shared: the rows of all runs go
        through one forward, whose rounding then depends on a run's company; otherwise each run has its own.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, shared: bool) -> None:
        self._model, self._device, self._shared = model, device, shared

    @cached_property
    def model(self) -> nn.Module:
        """The base on the device."""
        # What deepcopy finds in its memo it takes as it is, so that the weights are in memory once.
        shared = {id(each): nn.Parameter(each.detach(), requires_grad=False) for each in self._model.parameters()}
        return copy.deepcopy(self._model, dict(shared)).to(self._device).eval()

    @torch.no_grad()
    def targets(
        self, rows: Mapping[str, Sequence[Rows]], conditions: Mapping[str, Conditions | None]
    ) -> dict[str, list[Tensor]]:
        """The target of each of the rows of some runs: the rows' own, or what the base predicts.

        conditions: of each run's objective, on the device.
        """
        terms = {
            run: [
                inputs_of(part, conditions[run], row)
                for part in parts
                if isinstance(part.target, FromBase)
                for row in part.target.conditions
            ]
            for run, parts in rows.items()
        }
        found = self._predictions({run: asked for run, asked in terms.items() if asked})
        return {run: [_target(part, found.get(run, iter(()))) for part in parts] for run, parts in rows.items()}

    def _predictions(self, terms: Mapping[str, Sequence[Inputs]]) -> dict[str, Iterator[Tensor]]:
        if not self._shared or not terms:
            return {run: self._forward(asked) for run, asked in terms.items()}
        found = self._forward([term for asked in terms.values() for term in asked])
        return {run: iter([next(found) for _ in asked]) for run, asked in terms.items()}

    def _forward(self, terms: Sequence[Inputs]) -> Iterator[Tensor]:
        return iter(forward(self.model, concatenated(terms)).split([len(term.t) for term in terms]))


def inputs_of(rows: Rows, conditions: Conditions | None, row: Tensor | None = None) -> Inputs:
    """The arguments of a forward of rows; with the conditions ``row`` in place of their own where it is given."""
    row = rows.condition if row is None else row
    return Inputs(rows.x_t, rows.t, {} if conditions is None or row is None else conditions.take(row))


def _target(rows: Rows, predictions: Iterator[Tensor]) -> Tensor:
    if isinstance(rows.target, Tensor):
        return rows.target
    # Terms may be large and nearly cancel: they are not combined in what autocast made of them.
    first, *rest = (scale * next(predictions).to(rows.x_t.dtype) for scale in rows.target.scales)
    for term in rest:
        first = first + term
    return first
