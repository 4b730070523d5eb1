"""Protocols: the finite set of draws, with weights, that defines an exact score."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from guda_fast._validate import check_bool, check_int, describe
from guda_fast.diffusion.query_id import NOISE_CONTRACT
from guda_fast.diffusion.schedule import Float32Array, FloatArray, IntArray, Schedule, Scheduler

MAX_INDEX = 2**16 - 1  # the noise contract packs timestep and sample into one 32-bit word


@dataclass(frozen=True)
class DrawTable:
    """The draws of a protocol in its order: timestep by timestep, samples innermost.

    timestep, sample: [(D,), int64]. model_timestep: the timestep as the model takes it [(D,), int64 or float32].
    weight: factor of the squared error of the model's own prediction, already divided by the samples per timestep
    [(D,), float64]. x0_scale, eps_scale: x_t = x0_scale x0 + eps_scale eps;
    target_x0_scale, target_eps_scale: the same for what the model should predict [(D,), float64].
    """

    timestep: IntArray
    sample: IntArray
    model_timestep: IntArray | Float32Array
    weight: FloatArray
    x0_scale: FloatArray
    eps_scale: FloatArray
    target_x0_scale: FloatArray
    target_eps_scale: FloatArray

    def __len__(self) -> int:
        return len(self.timestep)


@dataclass(frozen=True, eq=False)
class Protocol:
    """Which draws with which weights make up a score; scores compare within one protocol only.

    score_k(x0) = sum over timesteps t and samples s of w_t (e_k(t, s) - e_0(t, s)) / samples. There is no
    factor for the stride of the timesteps.

    schedule: the noise schedule of the model.
    timesteps: distinct indices, kept in rising order [1..T-1 for named weightings; at most 65,535].
    weighting: "elbo", "elbo_fixed_large", "simple" or one weight a timestep (see ``Schedule.weights``).
    samples: noise samples a timestep [1..65,536; even when antithetic].
    seed: of the noise contract [0..2^64-1].
    antithetic: odd samples negate the noise of the sample before.

    Raises TypeError or ValueError naming the argument.

    >>> from diffusers import DDPMScheduler
    >>> protocol = Protocol.from_scheduler(DDPMScheduler(), start=10, stride=10)
    >>> len(protocol.timesteps), protocol.draws
    (99, 99)
    """

    schedule: Schedule
    timesteps: tuple[int, ...]
    weighting: str | tuple[float, ...] = "elbo"
    samples: int = 1
    seed: int = 42
    antithetic: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"Protocol: schedule must be a Schedule, got {describe(self.schedule)}")
        check_bool("Protocol", "antithetic", self.antithetic)
        steps = self.schedule.check_timesteps(self.timesteps)
        if steps.size == 0:
            raise ValueError("Protocol: timesteps must name at least one timestep, got none")
        if steps.max() > MAX_INDEX:
            raise ValueError(f"Protocol: timesteps must be at most {MAX_INDEX}, got {steps.max()}")
        unique, counts = np.unique(steps, return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"Protocol: timesteps must be distinct, got {unique[counts > 1][0]} more than once")
        check_int("Protocol", "samples", self.samples, 1, MAX_INDEX + 1)
        check_int("Protocol", "seed", self.seed, 0, 2**64 - 1)
        if self.antithetic and self.samples % 2:
            raise ValueError(f"Protocol: samples must be even when antithetic, got {self.samples}")
        self.schedule.weights(self.weighting, steps)
        order = np.argsort(steps)  # neighbours stand in for samples in standard errors
        object.__setattr__(self, "timesteps", tuple(int(t) for t in steps[order]))
        if not isinstance(self.weighting, str):
            object.__setattr__(self, "weighting", tuple(float(self.weighting[index]) for index in order))

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Schedule | Scheduler | Mapping[str, Any] | str | Path,
        *,
        start: int = 1,
        stop: int | None = None,
        stride: int = 1,
        weighting: str | Sequence[float] = "elbo",
        samples: int = 1,
        seed: int = 42,
        antithetic: bool = False,
    ) -> Protocol:
        """A protocol over the timesteps start, start + stride, ... below stop (the schedule's length).

        scheduler: a Schedule, or whatever ``Schedule.from_scheduler`` reads. Other arguments: see the class.
        """
        schedule = scheduler if isinstance(scheduler, Schedule) else Schedule.from_scheduler(scheduler)
        check_int("Protocol", "start", start, 0, len(schedule) - 1)
        check_int("Protocol", "stride", stride, 1)
        stop = len(schedule) if stop is None else check_int("Protocol", "stop", stop, start + 1, len(schedule))
        given = weighting if isinstance(weighting, str) else tuple(weighting)
        return cls(schedule, tuple(range(start, stop, stride)), given, samples, seed, antithetic)

    @property
    def draws(self) -> int:
        """Draws a query: timesteps times samples."""
        return len(self.timesteps) * self.samples

    @cached_property
    def table(self) -> DrawTable:
        """Timestep, sample, weight and scales of every draw."""
        timestep = np.repeat(np.asarray(self.timesteps, dtype=np.int64), self.samples)
        weight = self.schedule.weights(self.weighting, self.timesteps) / self.samples
        x0_scale, eps_scale = self.schedule.scales(timestep)
        target_x0_scale, target_eps_scale = self.schedule.target_scales(timestep)
        return DrawTable(
            timestep=timestep,
            sample=np.tile(np.arange(self.samples, dtype=np.int64), len(self.timesteps)),
            model_timestep=self.schedule.model_timesteps(timestep),
            weight=np.repeat(weight, self.samples),
            x0_scale=x0_scale,
            eps_scale=eps_scale,
            target_x0_scale=target_x0_scale,
            target_eps_scale=target_eps_scale,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything that defines the exact score, as JSON values: for run.json and cache keys."""
        return {
            "timesteps": list(self.timesteps),
            "weighting": self.weighting if isinstance(self.weighting, str) else list(self.weighting),
            "samples": self.samples,
            "seed": self.seed,
            "antithetic": self.antithetic,
            "prediction_type": self.schedule.prediction_type,
            "betas": hashlib.blake2b(self.schedule.betas.astype("<f8").tobytes(), digest_size=16).hexdigest(),
            "noise_contract": NOISE_CONTRACT,
        }
