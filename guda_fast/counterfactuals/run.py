"""One run: its batches, its optimiser and averaged weights, and what it has come to."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, nn

from guda_fast.counterfactuals.config import TrainConfig
from guda_fast.counterfactuals.objective import Batch, Objective
from guda_fast.counterfactuals.result import TrainResult
from guda_fast.counterfactuals.students import Students


class Run:
    """A run between two steps."""

    def __init__(
        self,
        name: str,
        objective: Objective,
        config: TrainConfig,
        students: Students,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._device, self._dtype = device, dtype
        given = objective.conditions
        self.conditions = None if given is None else given.to(device, dtype)
        self.name, self.objective, self.config, self.students = name, objective, config, students
        self.parameters = students.parameters(name)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=config.weight_decay)
        self.average = None if config.ema_decay is None else [value.detach().clone() for value in self.parameters]
        self.generator = torch.Generator().manual_seed(config.seed)
        self.losses: list[float] = []
        self.retain_losses: list[float] = []
        self.forget_losses: list[float | None] = []
        self.step, self.seconds, self.begin = 0, 0.0, time.perf_counter()

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.step == self.config.steps

    def draw(self) -> Batch:
        """The rows of a fresh batch, on the device."""
        batch = self.objective.draw(self.generator)
        forget = None if batch.forget is None else batch.forget.to(self._device, self._dtype)
        return Batch(batch.retain.to(self._device, self._dtype), forget)

    def update(self) -> None:
        """An optimiser step with the gradients that the parameters hold."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self.config.lr_factor(self.step)
        if self.config.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_average()
        self.step += 1

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is not None:
            decay = min(self.config.ema_decay or 0.0, (1 + self.step) / (10 + self.step))
            new: list[Tensor] = [value.detach() for value in self.parameters]
            torch._foreach_lerp_(self.average, new, 1 - decay)

    def result(self, where: str) -> TrainResult:
        """What the run gives in the end; FloatingPointError where its weights are not finite."""
        model = self._model()
        if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
            raise FloatingPointError(f"{where}: the weights must stay finite, got NaN or infinity after the last step")
        return TrainResult(model, self.losses, self.retain_losses, self.forget_losses, self.seconds, self.step)

    @torch.no_grad()
    def _model(self) -> nn.Module:
        if self.average is None:
            return self.students.model(self.name)
        kept = [value.detach().clone() for value in self.parameters]
        torch._foreach_copy_(list(self.parameters), self.average)
        try:
            return self.students.model(self.name)
        finally:
            torch._foreach_copy_(list(self.parameters), kept)

    def add_losses(self, total: float, retain: float, forget: float | None) -> None:
        """Keep the losses of a step; FloatingPointError where they are not finite."""
        self.losses.append(total)
        self.retain_losses.append(retain)
        self.forget_losses.append(forget)
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss must stay finite, got {total} at step {self.step}")
