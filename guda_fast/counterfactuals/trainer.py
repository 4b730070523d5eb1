"""One training loop for everything: base models, LOGO retraining and every unlearning operator."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from guda_fast._validate import check_choice, check_int, check_real
from guda_fast.counterfactuals.objective import FromBase, Objective, Rows

ProgressCallback = Callable[[int, int], object]
"""Called with (steps done, steps in all)."""


_SMALLEST = sys.float_info.min


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run.

    steps: optimiser steps [>= 1]. lr: AdamW's learning rate [> 0]. weight_decay: [>= 0].
    warmup_steps: the learning rate rises linearly over these steps [>= 0].
    decay: what it does afterwards ["constant", or "cosine" down to 0 at the last step].
    grad_clip: largest norm of the gradient [> 0, or None]. ema_decay: of the averaged weights that are
    returned [0..1, or None for the last weights]; it warms up as (1 + step) / (10 + step).
    seed: of batches, timesteps and noise.
    """

    steps: int
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: str = "constant"
    grad_clip: float | None = 1.0
    ema_decay: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("TrainConfig", "steps", self.steps, 1)
        check_real("TrainConfig", "lr", self.lr, _SMALLEST)
        check_real("TrainConfig", "weight_decay", self.weight_decay, 0)
        check_int("TrainConfig", "warmup_steps", self.warmup_steps, 0)
        check_choice("TrainConfig", "decay", self.decay, ("constant", "cosine"))
        check_int("TrainConfig", "seed", self.seed, 0, 2**63 - 1)
        if self.grad_clip is not None:
            check_real("TrainConfig", "grad_clip", self.grad_clip, _SMALLEST)
        if self.ema_decay is not None:
            check_real("TrainConfig", "ema_decay", self.ema_decay, 0, 1)

    def lr_factor(self, step: int) -> float:
        """The learning rate of a step as a share of ``lr``."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.decay == "constant":
            return 1.0
        return (1 + math.cos(math.pi * (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))) / 2


@dataclass(frozen=True)
class TrainResult:
    """model: a new module with the trained (or averaged) weights, in eval mode. losses: one a step."""

    model: nn.Module
    losses: Sequence[float]


def train(
    model: nn.Module,
    objective: Objective,
    config: TrainConfig,
    *,
    progress: ProgressCallback | None = None,
) -> TrainResult:
    """Minimise ``objective`` with AdamW, starting from a copy of ``model``, which stays as it is.

    model: any diffusers denoiser. objective: draws its own batches. progress: called after every step.

    Returns the trained copy and its losses. Raises FloatingPointError, naming the step, when the loss is no
    longer finite, or when the weights at the end are not. Runs on the CPU.
    """
    student = copy.deepcopy(model).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    learning_rate = torch.optim.lr_scheduler.LambdaLR(optimizer, config.lr_factor)
    average = None if config.ema_decay is None else copy.deepcopy(student).requires_grad_(False)
    generator = torch.Generator().manual_seed(config.seed)
    losses = []
    for step in range(config.steps):
        loss = _loss(student, model, objective, generator)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"train: the loss must stay finite, got {losses[-1]} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.grad_clip is not None:
            nn.utils.clip_grad_norm_(student.parameters(), config.grad_clip)
        optimizer.step()
        learning_rate.step()
        if average is not None:
            _update_average(average, student, min(config.ema_decay or 0.0, (1 + step) / (10 + step)))
        if progress is not None:
            progress(step + 1, config.steps)
    trained = student if average is None else average
    if not all(bool(torch.isfinite(parameter).all()) for parameter in trained.parameters()):
        raise FloatingPointError("train: the weights must stay finite, got NaN or infinity after the last step")
    return TrainResult(trained.eval().requires_grad_(False), losses)


@torch.no_grad()
def _update_average(average: nn.Module, student: nn.Module, decay: float) -> None:
    averaged: list[Tensor] = list(average.parameters())
    torch._foreach_lerp_(averaged, list(student.parameters()), 1 - decay)
    for kept, new in zip(average.buffers(), student.buffers(), strict=True):
        kept.copy_(new)


def _loss(student: nn.Module, base: nn.Module, objective: Objective, generator: torch.Generator) -> Tensor:
    batch = objective.draw(generator)
    parts = [rows for rows in (batch.retain, batch.forget) if rows is not None]
    x_t, t = torch.cat([rows.x_t for rows in parts]), torch.cat([rows.t for rows in parts])
    predictions = _predict(student, x_t, t).split([len(rows.t) for rows in parts])
    weights = (objective.retain_weight, objective.forget_weight)
    losses = [
        weight * (prediction - _target(base, rows)).square().mean()
        for weight, prediction, rows in zip(weights, predictions, parts, strict=False)
    ]
    return torch.stack(losses).sum()


def _target(base: nn.Module, rows: Rows) -> Tensor:
    if isinstance(rows.target, FromBase):
        raise NotImplementedError
    return rows.target


def _predict(model: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
    """The model's prediction, without variance channels if it has any [(B, C, H, W)]."""
    prediction: Tensor = model(x_t, t, return_dict=False)[0]
    return prediction[:, : x_t.shape[1]]
