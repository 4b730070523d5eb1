"""Generated images, through the schedulers of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from guda_fast._validate import check_int
from guda_fast.diffusion.conditions import Conditions


def sample_images(
    model: nn.Module,
    scheduler: Any,
    count: int,
    *,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    conditions: Conditions | None = None,
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Images drawn by ancestral sampling without guidance, which follows the model's own distribution.

    model: a denoiser such as UNet2DModel. scheduler: a diffusers scheduler with the model's noise schedule.
    count: images [>= 1]. steps: denoising steps [1..T; None for all T]. seed: of all noise.
    batch_size: images a forward [>= 1]. conditions: of each image, for a conditional model [of ``count`` images].

    Returns pixels [(count, H, W, C), uint8]. Source: Ho et al. 2020, algorithm 2.
    """
    from diffusers import DDPMScheduler  # heavy, and only needed here

    check_int("sample_images", "count", count, 1)
    check_int("sample_images", "batch_size", batch_size, 1)
    ancestral: Any = DDPMScheduler.from_config(scheduler.config)
    trained_steps = ancestral.config.num_train_timesteps
    if conditions is None:
        conditions = Conditions.none(count)
    if len(conditions) != count:
        raise ValueError(f"sample_images: conditions must be those of {count} images, got {len(conditions)}")
    steps = trained_steps if steps is None else check_int("sample_images", "steps", steps, 1, trained_steps)
    ancestral.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    with tqdm(total=count * steps, desc="generate", unit="forward", unit_scale=True, dynamic_ncols=True) as bar:
        for start in range(0, count, batch_size):
            size = min(batch_size, count - start)
            given = conditions.take(conditions.row[start : start + size])
            batches.append(_sample_batch(model, ancestral, size, given, generator, partial(bar.update, size)))
    return np.concatenate(batches)


@torch.inference_mode()
def _sample_batch(
    model: Any,
    scheduler: Any,
    size: int,
    given: Mapping[str, Any],
    generator: torch.Generator,
    advance: Callable[[], object],
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    height_width = model.config.sample_size
    if isinstance(height_width, int):
        height_width = (height_width, height_width)
    x_t = torch.randn((size, model.config.in_channels, *height_width), generator=generator)
    for t in scheduler.timesteps:
        prediction = model(x_t, t, return_dict=False, **given)[0]
        x_t = scheduler.step(prediction, t, x_t, generator=generator, return_dict=False)[0]
        advance()
    pixels = (x_t / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()
