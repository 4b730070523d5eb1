"""The models that runs train: a copy of the base each, or factors over a base that they share."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Inputs:
    """Rows of a forward, all on the device of the model.

    x_t: [(B, C, H, W), float]. t: [(B,), int64]. condition: further arguments by name [(B, ...) each, or mappings].
    """

    x_t: Tensor
    t: Tensor
    condition: Mapping[str, Any]


class Students(Protocol):
    """What one or several runs train; a run sees nothing of the others."""

    def parameters(self, run: str) -> list[nn.Parameter]:
        """What a run's optimiser changes, always in the same order."""

    def predict(self, inputs: Mapping[str, Inputs]) -> Mapping[str, Tensor]:
        """The predictions of some runs, with gradients, without variance channels [(B, C, H, W) each]."""

    def state(self, run: str) -> dict[str, Tensor]:
        """What ``load`` makes the run's model of again: live tensors by name, not copies."""

    def load(self, run: str, state: Mapping[str, Tensor]) -> None:
        """Copy what ``state`` gave into the run's tensors."""

    def model(self, run: str) -> nn.Module:
        """The run's model as it is now: a module of its own, merged, in eval mode, without gradients."""

    def factors(self, run: str) -> Mapping[str, Any] | None:
        """Copies of what an adapter is written from; None for dense runs."""


class DenseStudents:
    """A deep copy of the base for each run, of which only the selected parameters require gradients.

    base: stays as it is. runs: distinct names. trained: names of the parameters that change.
    """

    def __init__(self, base: nn.Module, runs: Sequence[str], trained: Collection[str], device: torch.device) -> None:
        self._models = {run: copy.deepcopy(base).to(device).train() for run in runs}
        self._all = len(trained) == len(list(base.parameters()))
        for model in self._models.values():
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trained)
                parameter.grad = None

    def parameters(self, run: str) -> list[nn.Parameter]:
        """Those that change, in the order of the module."""
        return [parameter for parameter in self._models[run].parameters() if parameter.requires_grad]

    def predict(self, inputs: Mapping[str, Inputs]) -> dict[str, Tensor]:
        """A forward for each run."""
        return {run: forward(self._models[run], self._traced(rows)) for run, rows in inputs.items()}

    def _traced(self, rows: Inputs) -> Inputs:
        """With gradients for x_t where only some parameters change.

        Before a group norm whose parameters do and whose channels-last input has none, PyTorch 2.13 crashes on a CPU.
        """
        return rows if self._all else replace(rows, x_t=rows.x_t.detach().requires_grad_())

    def state(self, run: str) -> dict[str, Tensor]:
        """The parameters that change, and all buffers."""
        model = self._models[run]
        found = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        return {**found, **dict(model.named_buffers())}

    @torch.no_grad()
    def load(self, run: str, state: Mapping[str, Tensor]) -> None:
        """Copy what ``state`` gave."""
        for name, value in self.state(run).items():
            value.copy_(state[name])

    def model(self, run: str) -> nn.Module:
        """A copy of the run's model."""
        model = copy.deepcopy(self._models[run])
        for parameter in model.parameters():
            parameter.grad = None
        return model.eval().requires_grad_(False)

    def factors(self, run: str) -> None:
        """There are none."""


def forward(model: nn.Module, rows: Inputs) -> Tensor:
    """A denoiser's prediction, without variance channels if it has any [(B, C, H, W)]."""
    prediction: Tensor = model(rows.x_t, timestep=rows.t, **rows.condition, return_dict=False)[0]
    return prediction[:, : rows.x_t.shape[1]]


def concatenated(inputs: Sequence[Inputs]) -> Inputs:
    """The rows of several inputs after each other."""
    x_t, t = torch.cat([rows.x_t for rows in inputs]), torch.cat([rows.t for rows in inputs])
    return Inputs(x_t, t, _concatenated([rows.condition for rows in inputs]))


def _concatenated(conditions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: (_concatenated if isinstance(value, Mapping) else torch.cat)([given[name] for given in conditions])
        for name, value in conditions[0].items()
    }
