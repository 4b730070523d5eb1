"""Objectives and small models for tests of training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from guda_fast import Schedule
from guda_fast.counterfactuals import Batch, FromBase, Rows, TrainResult
from guda_fast.diffusion.conditions import Conditions
from tiny import Scaled

SCHEDULE = Schedule.from_scheduler(DDPMScheduler())


@dataclass
class Fixed:
    """Draws the same rows in every step."""

    retain: Rows
    forget: Rows | None = None
    retain_weight: float = 1.0
    forget_weight: float = 1.0
    forget_share: float | None = None
    conditions: Conditions | None = None

    def draw(self, generator: torch.Generator) -> Batch:
        return Batch(self.retain, self.forget)


@dataclass
class Noise:
    """Draws normal noise, which a model should make ``retain`` times, and on forget rows ``forget`` times, as large."""

    retain: float = 0.5
    forget: float | None = 2.0
    retain_weight: float = 1.0
    forget_weight: float = 0.7
    forget_share: float | None = None
    conditions: Conditions | None = None
    shape: tuple[int, ...] = (3, 1, 8, 8)

    def draw(self, generator: torch.Generator) -> Batch:
        return Batch(self._rows(generator, self.retain), self._forget(generator))

    def _forget(self, generator: torch.Generator) -> Rows | None:
        return None if self.forget is None else self._rows(generator, self.forget)

    def _rows(self, generator: torch.Generator, factor: float) -> Rows:
        x_t = torch.randn(self.shape, generator=generator)
        return Rows(x_t, torch.randint(1000, (len(x_t),), generator=generator), None, factor * x_t)


class Dropping(Scaled):
    """Forgets half of what it sees while it is trained."""

    def __init__(self, factor: float) -> None:
        super().__init__(factor)
        self.drop = nn.Dropout(0.5)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.factor * self.drop(sample),)


def constant(target: float | FromBase, count: int = 4) -> Rows:
    """Images of ones, which a Scaled model predicts as its factor."""
    x_t = torch.ones(count, 1, 2, 2)
    aim = target if isinstance(target, FromBase) else torch.full_like(x_t, target)
    return Rows(x_t, torch.zeros(count, dtype=torch.int64), None, aim)


def weights(result: TrainResult | nn.Module) -> dict[str, Tensor]:
    """By name."""
    return (result if isinstance(result, nn.Module) else result.model).state_dict()


def assert_equal(found: TrainResult, expected: TrainResult) -> None:
    """Bit for bit."""
    assert list(found.losses) == list(expected.losses)
    assert changed(found.model, expected.model) == []


def changed(found: nn.Module, expected: nn.Module) -> list[str]:
    """The names of tensors that differ."""
    other = weights(expected)
    return [name for name, value in weights(found).items() if not torch.equal(value, other[name])]


def distance(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest difference."""
    return max(float((a - b).detach().abs().max()) for a, b in zip(found, expected, strict=True))
