"""The scripts' own arithmetic: they round alpha_bar to float32, which moves the weights of low timesteps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from guda_fast.diffusion import Protocol, Schedule
from guda_fast.diffusion.schedule import FloatArray
from guda_fast.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class RoundedSchedule(Schedule):
    """A schedule whose alpha_bar is the float32 product that diffusers' schedulers hold."""

    @cached_property
    def alpha_bar(self) -> FloatArray:
        """The scheduler's ``alphas_cumprod`` [(T,), float64 values of float32]."""
        betas = torch.from_numpy(np.array(self.betas, dtype=np.float32))
        rounded: FloatArray = torch.cumprod(1 - betas, dim=0).double().numpy()
        return rounded

    @classmethod
    def of(cls, scheduler: Mapping[str, Any] | None, origin: str) -> RoundedSchedule:
        """The schedule of a model's ``scheduler_config.json``; the scripts know noise predictions alone.

        Raises CheckpointError naming the model where it has no scheduler, or predicts something else.
        """
        if scheduler is None:
            raise CheckpointError(f"{origin}: must hold scheduler_config.json, found none")
        schedule = Schedule.from_scheduler(scheduler)
        if schedule.prediction_type != "epsilon":
            raise CheckpointError(
                f"{origin}: key 'prediction_type' of the scheduler must be 'epsilon', as the script assumes, "
                f"found {schedule.prediction_type!r}"
            )
        return cls(schedule.betas, schedule.prediction_type, schedule.config)


def scheduler_betas(schedule: Schedule, timesteps: Sequence[int]) -> FloatArray:
    """The scheduler's own betas [(D,), float64]."""
    return np.asarray(schedule.betas[list(timesteps)])


def quotient_betas(schedule: Schedule, timesteps: Sequence[int]) -> FloatArray:
    """1 - alpha_bar_t / alpha_bar_{t-1}, each step rounded to float32 [(D,), float64]."""
    rounded = schedule.alpha_bar.astype(np.float32)
    t = np.array(timesteps)
    betas: FloatArray = (np.float32(1) - rounded[t] / rounded[t - 1]).astype(np.float64)
    return betas


def script_protocol(
    schedule: RoundedSchedule, timesteps: Sequence[int], betas: FloatArray, *, seed: int, samples: int = 1
) -> Protocol:
    """The protocol whose weighted errors are a script's KL divergences.

        w_t = beta_t alpha_bar_{t-1} / (2 alpha_bar_t (1 - alpha_bar_{t-1}))

    which is what the means and variances of its posteriors come to with these betas and the rounded alpha_bar.

    timesteps: [at least 1]. betas: of each timestep. seed: of the contract's noise. samples: a timestep.
    """
    t = np.array(timesteps)
    alpha_bar, previous = schedule.alpha_bar[t], schedule.alpha_bar[t - 1]
    weights = betas * previous / (2 * alpha_bar * (1 - previous))
    return Protocol(schedule, tuple(timesteps), tuple(weights.tolist()), samples=samples, seed=seed)
