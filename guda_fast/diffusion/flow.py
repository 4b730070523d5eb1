"""Flow matching: the grid of noise levels, its weights, and which schedule a scheduler has."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from guda_fast._validate import check_choice, check_int, check_real, describe
from guda_fast.diffusion.schedule import Float32Array, FloatArray, IntArray, Schedule, Scheduler, read_config

WEIGHTINGS = ("elbo", "simple")
_LEAST = float(np.finfo(np.float32).tiny)
_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


@dataclass(frozen=True, eq=False)
class FlowSchedule:
    """A flow-matching schedule, x_s = (1 - s) x0 + s eps, whose model predicts the velocity eps - x0.

    A timestep is the index of a noise level in the grid, before any shift: with diffusers' schedulers of T steps the
    level of t is t / T, shifted.

    sigmas: the noise levels [(T + 1,), float64, rising from 0 to 1].
    timestep_scale: the model takes timestep_scale s as its timestep, in float32: T for models such as
        SD3Transformer2DModel, 1 for those that take s itself, as AuraFlow; None is the T of ``config``, 1000 without,
        and good for models that are known to take that [> 0].
    config: the scheduler configuration this came from.

    Raises TypeError or ValueError naming the argument. Source: Lipman et al. 2023; Esser et al. 2024.

    >>> FlowSchedule(np.linspace(0, 1, 5)).weights("elbo", [1, 2]).tolist()
    [0.75, 0.25]
    """

    sigmas: FloatArray
    timestep_scale: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    prediction_type: ClassVar[str] = "flow"

    def __post_init__(self) -> None:
        if self.timestep_scale is not None:
            check_real("FlowSchedule", "timestep_scale", self.timestep_scale, _LEAST)
        sigmas = np.array(self.sigmas, dtype=np.float64)
        rises = sigmas.ndim == 1 and sigmas.size >= 3 and sigmas[0] == 0 and sigmas[-1] == 1
        if not (rises and (np.diff(sigmas) > 0).all()):
            raise ValueError(
                f"FlowSchedule: sigmas must rise from 0 to 1 in at least two steps, got {describe(self.sigmas)}"
            )
        sigmas.flags.writeable = False
        object.__setattr__(self, "sigmas", sigmas)

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        *,
        shift: float | None = None,
        timestep_scale: float | None = None,
    ) -> FlowSchedule:
        """The grid that a flow-matching scheduler of diffusers was trained with: t / T, shifted.

        scheduler: a FlowMatchEulerDiscreteScheduler, its configuration, or a path; see ``Schedule.from_scheduler``.
        shift: s becomes shift s / (1 + (shift - 1) s) [> 0; the scheduler's by default; needed where it shifts by the
            size of the image]. timestep_scale: see the class.

        Raises TypeError or ValueError naming the argument, FileNotFoundError for a missing file.
        """
        config = _config(scheduler)
        check_choice("FlowSchedule", "scheduler", config.get("_class_name"), _SCHEDULERS)
        steps = steps_of(config)
        if config.get("invert_sigmas"):
            raise ValueError("FlowSchedule: scheduler must have noise levels that rise with t, got invert_sigmas")
        if shift is None:
            if config.get("use_dynamic_shifting"):
                raise ValueError(
                    "FlowSchedule: shift must be given for a scheduler with use_dynamic_shifting, which shifts by the "
                    "size of the image; pass FlowSchedule.from_scheduler(scheduler, shift=...)"
                )
            shift = config.get("shift", 1.0)
        shift = check_real("FlowSchedule", "shift", shift, _LEAST)
        plain = np.arange(steps + 1) / steps
        return cls(shift * plain / (1 + (shift - 1) * plain), timestep_scale, config)

    def __len__(self) -> int:
        """The number of timesteps T."""
        return len(self.sigmas) - 1

    @property
    def model_scale(self) -> float:
        """What s is multiplied by for the model: timestep_scale, or what stands for None."""
        return float(steps_of(self.config) if self.timestep_scale is None else self.timestep_scale)

    def scales(self, timesteps: Sequence[int] | IntArray) -> tuple[FloatArray, FloatArray]:
        """1 - s and s: the factors of x0 and eps in x_s [(D,), float64 each]."""
        s = self.sigmas[self.check_timesteps(timesteps)]
        return 1 - s, s

    def target_scales(self, timesteps: Sequence[int] | IntArray) -> tuple[FloatArray, FloatArray]:
        """-1 and 1: the factors of x0 and eps in the velocity [(D,), float64 each]."""
        ones = np.ones(len(self.check_timesteps(timesteps)))
        return -ones, ones

    def model_timesteps(self, timesteps: Sequence[int] | IntArray) -> Float32Array:
        """What the model takes as its timestep: model_scale s [(D,), float32]."""
        found: Float32Array = (self.model_scale * self.sigmas[self.check_timesteps(timesteps)]).astype(np.float32)
        return found

    def weights(self, weighting: str | Sequence[float], timesteps: Sequence[int] | IntArray) -> FloatArray:
        """The factor of the squared error of the velocity at each timestep.

        ``elbo``: (1 - s) / s times half the distance of the grid's neighbours of s, the ELBO's integral over s;
        ``simple``: 1, the training loss; a sequence: the caller's own.

        weighting: a name, or one finite weight >= 0 a timestep [(D,)]. timesteps: indices [(D,), 1..T-1].

        Returns factors [(D,), float64]. Raises ValueError for an unknown name, a wrong length or a timestep outside.
        Source: Kingma et al. 2021, eq. 11, with the signal (1 - s) and the noise s.
        """
        t = self.check_timesteps(timesteps)
        if not isinstance(weighting, str):
            given = np.asarray(weighting, dtype=np.float64)
            if given.shape != t.shape or not np.isfinite(given).all() or (given < 0).any():
                raise ValueError(
                    f"FlowSchedule.weights: weighting must be a name or {len(t)} finite weights of at least 0, got "
                    f"{describe(weighting)}"
                )
            return given
        check_choice("FlowSchedule.weights", "weighting", weighting, WEIGHTINGS)
        if weighting == "simple":
            return np.ones(len(t))
        s, spacing = self.sigmas[t], (self.sigmas[t + 1] - self.sigmas[t - 1]) / 2
        return np.asarray((1 - s) / s * spacing)

    def check_timesteps(self, timesteps: Sequence[int] | IntArray) -> IntArray:
        """The timesteps as an int64 array, or ValueError naming the first one outside 1..T-1."""
        t = np.asarray(timesteps)
        if t.ndim != 1 or (t.size and not np.issubdtype(t.dtype, np.integer)):
            raise TypeError(f"FlowSchedule: timesteps must be a sequence of integers, got {describe(timesteps)}")
        outside = (t < 1) | (t >= len(self))
        if outside.any():
            found = int(t[outside][0])
            raise ValueError(
                f"FlowSchedule: timesteps must be between 1 and {len(self) - 1}, where 0 < s < 1, got {found}"
            )
        return t.astype(np.int64)

    def to_dict(self) -> dict[str, Any]:
        """What scores depend on, as JSON values."""
        digest = hashlib.blake2b(self.sigmas.astype("<f8").tobytes(), digest_size=16).hexdigest()
        return {
            "prediction_type": self.prediction_type,
            "sigmas": digest,
            "timestep_scale": self.model_scale,
        }


def steps_of(config: Mapping[str, Any]) -> int:
    """How many steps a scheduler's configuration says that its model was trained with."""
    return check_int("FlowSchedule", "num_train_timesteps", config.get("num_train_timesteps", 1000), 2)


def is_flow(scheduler: Scheduler | Mapping[str, Any] | str | Path) -> bool:
    """Whether it is a flow-matching scheduler of diffusers, its configuration or its file."""
    name = _config(scheduler).get("_class_name")
    return isinstance(name, str) and name.startswith("FlowMatch")


def read_schedule(scheduler: Scheduler | Mapping[str, Any] | str | Path) -> Schedule | FlowSchedule:
    """The schedule of any scheduler of diffusers that has one; see `Schedule.from_scheduler`."""
    return FlowSchedule.from_scheduler(scheduler) if is_flow(scheduler) else Schedule.from_scheduler(scheduler)


def _config(scheduler: object) -> Mapping[str, Any]:
    if isinstance(scheduler, str | Path):
        return read_config(Path(scheduler))
    if isinstance(scheduler, Mapping):
        return scheduler
    config = getattr(scheduler, "config", {})
    return {**config, "_class_name": type(scheduler).__name__}
