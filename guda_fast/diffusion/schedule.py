"""Noise schedules: signal and noise scales, ELBO weights and prediction types."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from guda_fast._json import read_object
from guda_fast._validate import check_choice, describe

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
WEIGHTINGS = ("elbo", "elbo_fixed_large", "simple")

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
Float32Array = np.ndarray[Any, np.dtype[np.float32]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]


class Scheduler(Protocol):
    """The part of a diffusers scheduler that defines a variance-preserving noise schedule."""

    betas: torch.Tensor
    config: Any


@dataclass(frozen=True, eq=False)
class Schedule:
    """A variance-preserving noise schedule, x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps.

    alpha_bar_t is the float64 product of 1 - beta_s over s <= t. It is never derived from a scheduler's
    float32 ``alphas_cumprod``: differences of those are up to 0.4 % wrong on long cosine schedules.

    betas: noise variances [(T,), float64, in (0, 1]; only the last may be 1].
    prediction_type: what the model predicts ["epsilon", "v_prediction" or "sample"].
    config: the scheduler configuration this came from, kept for the record.

    Raises TypeError or ValueError for other shapes, values and names, and for a schedule that ends in
    alpha_bar = 0 with epsilon predictions (there x_t is pure noise, and predicting it says nothing of x0).

    >>> Schedule(np.array([0.1, 0.2])).alpha_bar
    array([0.9 , 0.72])
    """

    betas: FloatArray
    prediction_type: str = "epsilon"
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("Schedule", "prediction_type", self.prediction_type, PREDICTION_TYPES)
        betas = np.array(self.betas, dtype=np.float64)
        if betas.ndim != 1 or betas.size == 0:
            raise ValueError(f"Schedule: betas must have shape (T,) with T >= 1, got {betas.shape}")
        inside = (betas > 0) & (betas < 1)
        inside[-1] = 0 < betas[-1] <= 1
        if not inside.all():
            t = int(np.argmin(inside))
            raise ValueError(f"Schedule: betas must be in (0, 1), got {betas[t]!r} at timestep {t}")
        if betas[-1] == 1 and self.prediction_type == "epsilon":
            raise ValueError(
                "Schedule: alpha_bar must stay above 0 for epsilon predictions, got 0 at the last timestep "
                "(a zero-terminal-SNR schedule needs v_prediction or sample)"
            )
        betas.flags.writeable = False
        object.__setattr__(self, "betas", betas)

    @classmethod
    def from_scheduler(cls, scheduler: Scheduler | Mapping[str, Any] | str | Path) -> Schedule:
        """Read the schedule of a diffusers scheduler: DDPM, DDIM and all others that have ``betas``.

        scheduler: a scheduler object, its configuration as a mapping with ``_class_name``, or the path of
            ``scheduler_config.json`` or of the folder that holds it.

        Raises TypeError for another type, ValueError for a scheduler without betas or an unknown class,
        FileNotFoundError for a missing file.
        """
        if isinstance(scheduler, str | Path):
            scheduler = read_config(Path(scheduler))
        if isinstance(scheduler, Mapping):
            scheduler = _build_scheduler(scheduler)
        betas = getattr(scheduler, "betas", None)
        if not isinstance(betas, torch.Tensor):
            raise ValueError(
                "Schedule: scheduler must have betas (DDPM, DDIM and others that share alphas_cumprod), "
                f"got {type(scheduler).__name__}"
            )
        config = dict(getattr(scheduler, "config", {}))
        schedule = cls(betas.double().cpu().numpy(), config.get("prediction_type", "epsilon"), config)
        alpha_bar = getattr(scheduler, "alphas_cumprod", None)
        # Some add 2^-24 at the end of zero-terminal schedules; others use another alpha_bar altogether.
        if isinstance(alpha_bar, torch.Tensor) and not np.allclose(alpha_bar, schedule.alpha_bar, rtol=0, atol=1e-4):
            raise ValueError(
                "Schedule: scheduler must have alphas_cumprod = product of 1 - betas, "
                f"got other values in {type(scheduler).__name__}"
            )
        return schedule

    def __len__(self) -> int:
        """The number of timesteps T."""
        return len(self.betas)

    @cached_property
    def alpha_bar(self) -> FloatArray:
        """Cumulative signal variance alpha_bar_t [(T,), float64]."""
        return np.asarray(np.cumprod(1 - self.betas), dtype=np.float64)

    def scales(self, timesteps: Sequence[int] | IntArray) -> tuple[FloatArray, FloatArray]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t): the factors of x0 and eps in x_t [(D,), float64 each]."""
        alpha_bar = self.alpha_bar[self.check_timesteps(timesteps)]
        return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)

    def model_timesteps(self, timesteps: Sequence[int] | IntArray) -> IntArray:
        """What the model takes as its timestep: the indices themselves [(D,), int64]."""
        return self.check_timesteps(timesteps)

    def target_scales(self, timesteps: Sequence[int] | IntArray) -> tuple[FloatArray, FloatArray]:
        """The factors of x0 and eps in what the model should predict [(D,), float64 each].

        epsilon: (0, 1); v_prediction: (-sqrt(1 - alpha_bar_t), sqrt(alpha_bar_t)); sample: (1, 0).
        """
        signal, sigma = self.scales(timesteps)
        if self.prediction_type == "epsilon":
            return np.zeros_like(signal), np.ones_like(signal)
        if self.prediction_type == "sample":
            return np.ones_like(signal), np.zeros_like(signal)
        return -sigma, signal

    def weights(self, weighting: str | Sequence[float], timesteps: Sequence[int] | IntArray) -> FloatArray:
        """The factor of the squared error of the model's own prediction at each timestep.

        With w_t the weight of the noise-prediction error (``elbo``: beta_t / (2 alpha_t (1 - alpha_bar_{t-1})),
        the KL between posteriors with the shared fixed-small variance; ``elbo_fixed_large``: variance beta_t
        instead; ``simple``: 1; a sequence: the caller's), the factor is w_t for epsilon, alpha_bar_t w_t for
        v_prediction and alpha_bar_t / (1 - alpha_bar_t) w_t for sample, in closed forms that stay finite
        where alpha_bar_t = 0.

        weighting: a name, or one finite weight >= 0 a timestep [(D,)].
        timesteps: indices [(D,), integers in 1..T-1 for named weights, 0..T-1 for given ones].

        Returns factors [(D,), float64]. Raises ValueError for an unknown name, a wrong length or a timestep
        outside. Source: Ho et al. 2020, eq. 8 and 12; Salimans and Ho 2022 for v.

        >>> Schedule(np.array([0.1, 0.2])).weights("elbo", [1])
        array([1.25])
        """
        t = self.check_timesteps(timesteps)
        if not isinstance(weighting, str):
            return self._given_weights(weighting, t)
        check_choice("Schedule.weights", "weighting", weighting, WEIGHTINGS)
        if (t < 1).any():
            raise ValueError(f"Schedule.weights: timesteps must be at least 1 for {weighting!r} weights, got 0")
        if weighting == "simple":
            return self._noise_error_factor(t)
        return self._elbo_weights(t, fixed_large=weighting == "elbo_fixed_large")

    def check_timesteps(self, timesteps: Sequence[int] | IntArray) -> IntArray:
        """The timesteps as an int64 array, or ValueError naming the first one outside 0..T-1."""
        t = np.asarray(timesteps)
        if t.ndim != 1 or (t.size and not np.issubdtype(t.dtype, np.integer)):
            raise TypeError(f"Schedule: timesteps must be a sequence of integers, got {describe(timesteps)}")
        outside = (t < 0) | (t >= len(self))
        if outside.any():
            found = int(t[outside][0])
            raise ValueError(f"Schedule: timesteps must be between 0 and {len(self) - 1}, got {found}")
        return t.astype(np.int64)

    def to_dict(self) -> dict[str, Any]:
        """What scores depend on, as JSON values."""
        digest = hashlib.blake2b(self.betas.astype("<f8").tobytes(), digest_size=16).hexdigest()
        return {"prediction_type": self.prediction_type, "betas": digest}

    def _elbo_weights(self, t: IntArray, fixed_large: bool) -> FloatArray:
        beta, alpha_bar, previous = self.betas[t], self.alpha_bar[t], self.alpha_bar[t - 1]
        variance = 1 - alpha_bar if fixed_large else 1 - previous
        if self.prediction_type == "epsilon":
            return beta / (2 * (1 - beta) * variance)
        if self.prediction_type == "v_prediction":
            return beta * previous / (2 * variance)
        return beta * previous / (2 * (1 - alpha_bar) * variance)

    def _noise_error_factor(self, t: IntArray) -> FloatArray:
        """|| eps_hat - eps ||^2 over the squared error of the model's own prediction."""
        alpha_bar = self.alpha_bar[t]
        if self.prediction_type == "epsilon":
            return np.ones_like(alpha_bar)
        return alpha_bar if self.prediction_type == "v_prediction" else alpha_bar / (1 - alpha_bar)

    def _given_weights(self, weighting: Sequence[float], t: IntArray) -> FloatArray:
        given = np.asarray(weighting, dtype=np.float64)
        if given.shape != t.shape or not np.isfinite(given).all() or (given < 0).any():
            raise ValueError(
                f"Schedule.weights: weighting must be a name or {len(t)} finite weights of at least 0, "
                f"got {describe(weighting)}"
            )
        return given * self._noise_error_factor(t)


def read_config(path: Path) -> Mapping[str, Any]:
    """A scheduler's configuration from its file, or from the folder that holds it."""
    file = path / "scheduler_config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"Schedule: {file} must be a scheduler configuration, found no such file")
    return read_object(file)


def _build_scheduler(config: Mapping[str, Any]) -> Scheduler:
    import diffusers  # heavy, and not needed by those who bring a scheduler object

    name = config.get("_class_name")
    scheduler_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if scheduler_class is None or not issubclass(scheduler_class, diffusers.SchedulerMixin):
        raise ValueError(f"Schedule: config must name a diffusers scheduler in _class_name, got {name!r}")
    scheduler: Scheduler = scheduler_class.from_config(dict(config))
    return scheduler
