"""One run: its batches, its optimiser and averaged weights, its log and checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from guda_fast.counterfactuals.bound import RetainBound
from guda_fast.counterfactuals.checkpoint import CHECKPOINT, Checkpoint, read_checkpoint, write_checkpoint
from guda_fast.counterfactuals.config import TrainConfig
from guda_fast.counterfactuals.gradients import ForgetGradients
from guda_fast.counterfactuals.log import LOG, Log
from guda_fast.counterfactuals.objective import Batch, Objective
from guda_fast.counterfactuals.result import TrainResult
from guda_fast.counterfactuals.students import Students
from guda_fast.diffusion.conditions import Conditions
from guda_fast.errors import MENDABLE

_Read = TypeVar("_Read")
FAILURES = (*MENDABLE, TypeError, RuntimeError)
"""What ends one run and not those it goes with; anything else is a mistake in the code, and ends all."""
# A loss scale begins at 2^16. A gradient that overflows float16 at this one too is of no use at any.
_SMALLEST_SCALE = 2.0**-16
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")


class Run:
    """A run between two steps; it begins as the base.

    students: hold its weights under ``name``. conditions: of its objective, on the device.
    """

    def __init__(
        self,
        name: str,
        objective: Objective,
        config: TrainConfig,
        students: Students,
        conditions: Conditions | None,
        device: torch.device,
    ) -> None:
        self.name, self.objective, self.config, self.students = name, objective, config, students
        self.conditions, self.parameters = conditions, students.parameters(name)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.step, self.seconds = 0, 0.0
        self._skipped = 0
        self.stopped: str | None = None
        self.losses: list[tuple[float, float, float]] = []
        self.forget_gradients = ForgetGradients()
        self._optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=config.weight_decay)
        self._average = None if config.ema_decay is None else self._values()
        self._device, self._dtype = device, self.parameters[0].dtype
        self._work: Path | None = None
        self._settings: Mapping[str, Any] = {}
        self._log = Log(None)
        self._first: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._bound: RetainBound | None = None
        self._within: list[Tensor] = []
        self._within_step = 0

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.stopped is not None or self.step == self.config.steps

    def kept_in(self, work: Path, settings: Mapping[str, Any]) -> None:
        """Keep checkpoint and log in a folder. settings: JSON values by which the checkpoint is known."""
        self._work, self._settings, self._log = work, settings, Log(work / LOG)

    def masked(self, masks: Sequence[Tensor]) -> None:
        """From now on only these elements change; before the first step."""
        self._masks, self._first = list(masks), self._values()

    def bounded(self, bound: RetainBound) -> None:
        """From now on the retain loss is looked at; before the first step."""
        self._bound, self._within = bound, self._values()

    def draw(self, generator: torch.Generator | None = None) -> Batch:
        """The rows of a fresh batch on the device, from the run's own generator or another one."""
        batch = self.objective.draw(self.generator if generator is None else generator)
        forget = None if batch.forget is None else batch.forget.to(self._device, self._dtype)
        return Batch(batch.retain.to(self._device, self._dtype), forget)

    def update(self, losses: tuple[float, float, float]) -> dict[str, float | None]:
        """An optimiser step with the gradients that the parameters hold; what ``keep`` takes.

        losses: the step's objective, and its retain and forget errors [NaN without forget rows].
        Raises FloatingPointError where the gradient is not finite, but for a scaled one that overflowed.
        """
        lr = self.config.lr * self.config.lr_factor(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norms = self.forget_gradients.join(self.parameters, self._masks, self.objective.forget_share)
        unscaled = 1.0 / self.scaler.get_scale()
        overflowed = self._overflowed()
        self.scaler.unscale_(self._optimizer)
        norm = self._clip(overflowed)
        self.scaler.step(self._optimizer)
        self.scaler.update()
        self._skipped += overflowed
        self._optimizer.zero_grad(set_to_none=True)
        self._keep_unmasked()
        self._update_average()
        self.step += 1
        self.losses.append(losses)
        loss, retain, forget = losses
        record = {"step": self.step, "loss": loss, "retain": retain, "forget": forget, "lr": lr, "grad_norm": norm}
        skipped = {"skipped": self._skipped} if self.scaler.is_enabled() else {}
        self._look()
        return {**record, **norms.record(unscaled), **skipped}

    def keep(self, record: Mapping[str, float | None], seconds: float) -> None:
        """Put a step into the log. seconds: it took."""
        self.seconds += seconds
        self._log.add({**record, "seconds": round(self.seconds, 3)})

    def _overflowed(self) -> bool:
        """Whether the scaler leaves this step out; FloatingPointError where a smaller scale would not help."""
        if not self.scaler.is_enabled():
            return False
        finite = [each.grad.isfinite().all() for each in self.parameters if each.grad is not None]
        if not finite or bool(torch.stack(finite).all()):
            return False
        if (scale := self.scaler.get_scale()) <= _SMALLEST_SCALE:
            raise FloatingPointError(
                f"the gradient must become finite in float16 as its scale falls, got NaN or infinity "
                f"at step {self.step} with a scale of {scale:g}; {self._skipped} steps were left out"
            )
        return True

    def _clip(self, overflowed: bool) -> float:
        gradients = [each.grad for each in self.parameters if each.grad is not None]
        total = get_total_norm(gradients)
        norm = total.item()
        # Unscaling may overflow what was finite, which the scaler does not see.
        if not math.isfinite(norm) and not overflowed:
            raise FloatingPointError(f"the gradient's norm must stay finite, got {norm} at step {self.step}")
        if self.config.grad_clip is not None:
            clip_grads_with_norm_(self.parameters, self.config.grad_clip, total)
        return norm

    @torch.no_grad()
    def _keep_unmasked(self) -> None:
        """Undo what weight decay did to elements that may not change."""
        for parameter, mask, first in zip(self.parameters, self._masks, self._first, strict=False):
            parameter.copy_(torch.where(mask, parameter, first))

    @torch.no_grad()
    def _update_average(self) -> None:
        if self._average is not None:
            decay = min(self.config.ema_decay or 0.0, (1 + self.step) / (10 + self.step))
            new: list[Tensor] = list(self.parameters)
            torch._foreach_lerp_(self._average, new, 1 - decay)

    def _look(self) -> None:
        if self._bound is None or not (self.step % self.config.bound_every == 0 or self.step == self.config.steps):
            return
        ratio = self._bound.ratio(self._model(self._given()))
        if ratio <= (self.config.retain_bound or math.inf):
            self._within, self._within_step = [value.clone() for value in self._given()], self.step
            return
        found = (
            f"retain loss {ratio:.4g} times the base's at step {self.step}, over the bound of "
            f"{self.config.retain_bound:g}"
        )
        if self._within_step == 0:  # what would be given is the base, which scores zero everywhere
            raise ValueError(f"{found}, before any state within it; lower lr or weight, raise it, or lower bound_every")
        self.stopped = f"{found}; the state of step {self._within_step} is given"

    def result(self, device: torch.device) -> TrainResult:
        """What the run gives in the end, on a device; FloatingPointError where its weights are not finite."""
        if self._skipped == self.step:
            raise FloatingPointError(f"some step must be applied, got {self.step} whose gradients overflowed float16")
        early = self.stopped is not None
        values = self._within if early else self._given()
        model = self._model(values)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
            raise FloatingPointError("the weights must stay finite, got NaN or infinity after the last step")
        return TrainResult(
            model.to(device),
            self.config,
            [loss for loss, _, _ in self.losses],
            [retain for _, retain, _ in self.losses],
            [None if math.isnan(forget) else forget for _, _, forget in self.losses],
            self._log.lines,
            self.seconds,
            self._within_step if early else self.step,
            self.stopped,
            self._with(values, self.students.factors),
        )

    def checkpoint(self) -> None:
        """Write what ``resume`` reads; FloatingPointError, and the one before stays, where weights are not finite."""
        if self._work is None:
            return
        if not all(bool(torch.isfinite(value).all()) for value in (*self.parameters, *(self._average or ()))):
            raise FloatingPointError(f"the weights must stay finite, got NaN or infinity after step {self.step}")
        lists = {"average": self._average or [], "mask": self._masks, "within": self._within}
        tensors = {f"{name}.{i}": value for name, values in lists.items() for i, value in enumerate(values)}
        tensors |= {f"student.{name}": value for name, value in self.students.state(self.name).items()}
        for i, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
        tensors["generator"] = self.generator.get_state()
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64).view(-1, 3)
        values = {
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self._skipped,
            "stopped": self.stopped,
            "within_step": self._within_step,
            "scaler": self.scaler.state_dict(),
        }
        write_checkpoint(self._work / CHECKPOINT, Checkpoint(tensors, values), self._settings)

    def resume(self) -> bool:
        """Go on from the checkpoint in the folder, if there is one.

        Raises CheckpointError where it is damaged, or another run's.
        """
        if self._work is None:
            return False
        self._work.mkdir(parents=True, exist_ok=True)
        self._sweep()
        found = read_checkpoint(self._work / CHECKPOINT, self._settings)
        if found is not None:
            self._restore(found)
        self._log.cut(self.step)
        return found is not None

    def _sweep(self) -> None:
        """Remove what a process that was killed while it wrote left behind: the folder is this run's own."""
        assert self._work is not None
        for path in self._work.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _restore(self, found: Checkpoint) -> None:
        tensors, values = found.tensors, found.values
        self.step, self.seconds, self.stopped = values["step"], values["seconds"], values["stopped"]
        self._skipped = values["skipped"]
        self.losses = [(loss, retain, forget) for loss, retain, forget in tensors["losses"].tolist()]
        if self.config.saliency is not None:
            self.masked(self._listed(tensors, "mask"))
        self.students.load(self.name, _below(tensors, "student"))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _below(tensors, "optimizer").items():
            number, key = name.split(".")
            state.setdefault(int(number), {})[key] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.generator.set_state(tensors["generator"])
        if values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])
        self._average = self._listed(tensors, "average") if self._average is not None else None
        self._within, self._within_step = self._listed(tensors, "within"), values["within_step"]

    def _listed(self, tensors: Mapping[str, Tensor], name: str) -> list[Tensor]:
        found = _below(tensors, name)
        return [found[str(i)].to(self._device) for i in range(len(found))]

    def _values(self) -> list[Tensor]:
        return [each.detach().clone() for each in self.parameters]

    def _given(self) -> list[Tensor]:
        """The values that the run would give now."""
        return [each.detach() for each in self.parameters] if self._average is None else self._average

    def _model(self, values: Sequence[Tensor]) -> nn.Module:
        return self._with(values, self.students.model)

    @torch.no_grad()
    def _with(self, values: Sequence[Tensor], read: Callable[[str], _Read]) -> _Read:
        """What the students give of this run while its parameters have other values."""
        kept = self._values()
        own: list[Tensor] = list(self.parameters)
        torch._foreach_copy_(own, list(values))
        try:
            return read(self.name)
        finally:
            torch._foreach_copy_(own, kept)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
