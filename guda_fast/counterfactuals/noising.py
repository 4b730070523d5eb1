"""Noised training batches: timesteps, noise, x_t and what a model should predict for it."""

from __future__ import annotations

import torch
from torch import Tensor

from guda_fast.diffusion.schedule import Schedule


class Noising:
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, from float32 tables of the schedule."""

    def __init__(self, schedule: Schedule) -> None:
        steps = range(len(schedule))
        self.timesteps = len(schedule)
        self.x0_scale, self.eps_scale = (torch.from_numpy(scale).float() for scale in schedule.scales(steps))
        self.target_scales = [torch.from_numpy(scale).float() for scale in schedule.target_scales(steps)]

    def sample(self, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Uniform timesteps [(B,), int64] and normal noise [(B, C, H, W), float32] for x0."""
        t = torch.randint(self.timesteps, (len(x0),), generator=generator)
        return t, torch.randn(x0.shape, generator=generator)

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t [(B, C, H, W), float32]."""
        return per_image(self.x0_scale[t]) * x0 + per_image(self.eps_scale[t]) * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the model should predict for x_t, by the schedule's prediction type [(B, C, H, W), float32]."""
        x0_scale, eps_scale = self.target_scales
        return per_image(x0_scale[t]) * x0 + per_image(eps_scale[t]) * eps


def per_image(values: Tensor) -> Tensor:
    """One factor an image, shaped to multiply (B, C, H, W)."""
    return values[:, None, None, None]
