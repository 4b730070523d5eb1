"""What a run minimises: an objective draws noised images with their targets, the trainer makes losses of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from guda_fast._validate import check_choice, check_int, check_tensor
from guda_fast.counterfactuals.noising import Noising
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.diffusion.conditions import Conditions
from guda_fast.diffusion.schedule import Schedule


@dataclass(frozen=True)
class FromBase:
    """A target that the frozen base gives: sum_j scale_j eps_0(x_t, t, condition_j).

    scales: [J]. conditions: rows of the objective's conditions, a tensor a scale [(B,), int64; None: the rows' own].
    """

    scales: tuple[float, ...] = (1.0,)
    conditions: tuple[Tensor | None, ...] = (None,)

    def to(self, device: torch.device) -> FromBase:
        """The same on a device."""
        return replace(self, conditions=tuple(None if row is None else row.to(device) for row in self.conditions))


@dataclass(frozen=True)
class Rows:
    """Noised images, and what should be predicted for them.

    x_t: [(B, C, H, W), float32]. t: [(B,), int64]. condition: rows of the objective's conditions [(B,), int64; None
    for an unconditional model]. target: [(B, C, H, W), float32], or what the base predicts.
    true: the ordinary target, by which a retain bound judges rows whose ``target`` is the base's prediction
        [(B, C, H, W), float32; None where ``target`` is it, or no bound is wanted].
    """

    x_t: Tensor
    t: Tensor
    condition: Tensor | None
    target: Tensor | FromBase
    true: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Rows:
        """The same on a device, images and targets in a dtype."""
        target = self.target.to(device) if isinstance(self.target, FromBase) else self.target.to(device, dtype)
        return Rows(
            self.x_t.to(device, dtype),
            self.t.to(device),
            None if self.condition is None else self.condition.to(device),
            target,
            None if self.true is None else self.true.to(device, dtype),
        )


@dataclass(frozen=True)
class Batch:
    """The rows of one step: images to keep, and images to forget (None where nothing is)."""

    retain: Rows
    forget: Rows | None = None


class Objective(Protocol):
    """L = retain_weight MSE(retain rows) + forget_weight MSE(forget rows), means over all elements of the rows.

    conditions: distinct conditions that ``Rows.condition`` counts [None for an unconditional model]
    forget_share: the forget gradient is scaled down to at most this share of the norm of the weighted retain gradient,
        in every step [None: as it is]
    """

    conditions: Conditions | None
    retain_weight: float
    forget_weight: float
    forget_share: float | None

    def draw(self, generator: torch.Generator) -> Batch:
        """The rows of a fresh step; all its randomness is the generator's."""


@runtime_checkable
class HasBoundRows(Protocol):
    """An objective whose retain rows also show the group, so that a retain bound needs others."""

    def bound_rows(self, generator: torch.Generator) -> Rows:
        """Rows of images that remain; all their randomness is the generator's."""


class DenoisingObjective:
    """The ordinary loss: the mean squared error of the model's own prediction at uniform timesteps.

    data: images, and conditions for a conditional model. schedule: noise scales and prediction type.
    index: which images [(N',), int64, rising; None for all]. batch_size: images a step [>= 1].
    retain: the target: ``standard`` is the noise (or what else the schedule says), ``distill`` what the base predicts.

    Raises TypeError or ValueError naming the argument. Source: Ho et al. 2020, eq. 14.
    """

    retain_weight, forget_weight = 1.0, 0.0
    forget_share: float | None = None

    def __init__(
        self,
        data: GroupedImages,
        schedule: Schedule,
        index: Tensor | None = None,
        *,
        batch_size: int = 64,
        retain: str = "standard",
    ) -> None:
        where = "DenoisingObjective"
        self.index = torch.arange(len(data)) if index is None else index
        check_tensor(where, "index", self.index, shape=(None,), dtypes=(torch.int64,))
        if len(self.index) == 0:
            raise ValueError(f"{where}: index must name at least one image, got none")
        self.batch_size = check_int(where, "batch_size", batch_size, 1)
        self.retain = check_choice(where, "retain", retain, ("standard", "distill"))
        self.data, self.conditions = data, data.conditions
        self.noising = Noising(schedule)

    def draw(self, generator: torch.Generator) -> Batch:
        """The rows of a fresh step."""
        return Batch(self.rows(generator))

    def rows(self, generator: torch.Generator) -> Rows:
        """Noised images of a fresh step."""
        drawn = self.index[torch.randint(len(self.index), (self.batch_size,), generator=generator)]
        x0 = self.data.take(drawn)
        t, eps = self.noising.sample(x0, generator)
        x_t, condition = self.noising.noise(x0, eps, t), condition_of(self.data, drawn)
        true = self.noising.target(x0, eps, t)
        return Rows(x_t, t, condition, FromBase(), true) if self.retain == "distill" else Rows(x_t, t, condition, true)


def condition_of(data: GroupedImages, index: Tensor) -> Tensor | None:
    """The rows of ``data.conditions`` for some of its images [(B,), int64; None without conditions]."""
    return None if data.conditions is None else data.conditions.row[index]
