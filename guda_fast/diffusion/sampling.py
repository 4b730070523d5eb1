"""Generated images, through the pipelines of diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from guda_fast._validate import check_int


def sample_images(
    model: nn.Module,
    scheduler: Any,
    count: int,
    *,
    steps: int = 100,
    seed: int = 0,
    batch_size: int = 256,
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Unconditional images drawn by DDIM.

    model: a denoiser such as UNet2DModel. scheduler: a diffusers scheduler with the model's noise schedule.
    count: images [>= 1]. steps: denoising steps [>= 1]. seed: of the initial noise. batch_size: a forward.

    Returns pixels [(count, H, W, C), uint8]. Source: Song et al. 2021 (DDIM), eq. 12 with eta = 0.
    """
    from diffusers import DDIMPipeline, DDIMScheduler  # heavy, and only needed here

    check_int("sample_images", "count", count, 1)
    pipeline: Any = DDIMPipeline(model, DDIMScheduler.from_config(scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for start in range(0, count, batch_size):
        output = pipeline(
            batch_size=min(batch_size, count - start),
            generator=generator,
            num_inference_steps=steps,
            output_type="np",
        )
        batches.append(np.round(output.images * 255).astype(np.uint8))
    return np.concatenate(batches)
