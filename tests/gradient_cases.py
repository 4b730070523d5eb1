"""Images, schedules and noised rows that tests of gradients share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from guda_fast.diffusion import query_id
from guda_fast.diffusion.flow import read_schedule
from guda_fast.reference.philox import standard_normals

STEPS = [90, 10, 40]
SCHEDULERS: dict[str, Any] = {
    "noise": lambda: DDPMScheduler(num_train_timesteps=100),
    "v": lambda: DDPMScheduler(num_train_timesteps=100, prediction_type="v_prediction"),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(num_train_timesteps=100),
}


def images(count: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noised(scheduler: Any, image: Tensor, seed: int, steps: list[int] = STEPS) -> list[tuple[Tensor, Tensor, Tensor]]:
    """x_t, target and time of an image at each timestep [(C, H, W), (C, H, W), ()], from the definition."""
    schedule = read_schedule(scheduler)
    identity = torch.from_numpy(np.array([query_id(image.numpy())], dtype=np.uint64).view(np.int64))
    found = []
    for t in steps:
        draw = (identity, torch.tensor([t]), torch.tensor([0]), image.numel())
        eps = standard_normals(*draw, seed=seed, dtype=torch.float64).reshape(image.shape)
        (a,), (b,) = schedule.scales([t])
        (c,), (d,) = schedule.target_scales([t])
        x0 = image.double()
        found.append((a * x0 + b * eps, c * x0 + d * eps, torch.from_numpy(schedule.model_timesteps([t]))))
    return found
