"""The frozen base: what it predicts is the target of distillation, ESD and redirection."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from guda_fast.counterfactuals.objective import FromBase, Rows
from guda_fast.counterfactuals.students import Inputs, forward
from guda_fast.forward.conditions import Conditions


class FrozenBase:
    """A copy of the base in eval mode, made when it is first asked.

    model: stays as it is. shared: the rows of all runs go through one forward, whose rounding then depends on a
        run's company; otherwise each run has a forward of its own.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, shared: bool) -> None:
        self._model, self._device, self._shared = model, device, shared

    @cached_property
    def _frozen(self) -> nn.Module:
        return copy.deepcopy(self._model).to(self._device).eval().requires_grad_(False)

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
        return iter(forward(self._frozen, concatenated(terms)).split([len(term.t) for term in terms]))


def inputs_of(rows: Rows, conditions: Conditions | None, row: Tensor | None = None) -> Inputs:
    """The arguments of a forward of rows; with the conditions ``row`` in place of their own where it is given."""
    row = rows.condition if row is None else row
    return Inputs(rows.x_t, rows.t, {} if conditions is None or row is None else conditions.take(row))


def concatenated(inputs: Sequence[Inputs]) -> Inputs:
    """The rows of several inputs after each other."""
    x_t, t = torch.cat([rows.x_t for rows in inputs]), torch.cat([rows.t for rows in inputs])
    return Inputs(x_t, t, _concatenated([rows.condition for rows in inputs]))


def _concatenated(conditions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: (_concatenated if isinstance(value, Mapping) else torch.cat)([given[name] for given in conditions])
        for name, value in conditions[0].items()
    }


def _target(rows: Rows, predictions: Iterator[Tensor]) -> Tensor:
    if isinstance(rows.target, Tensor):
        return rows.target
    first, *rest = (scale * next(predictions) for scale in rows.target.scales)
    for term in rest:
        first = first + term
    return first.to(rows.x_t.dtype)
