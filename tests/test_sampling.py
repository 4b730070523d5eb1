"""Sampling: the same pixels as diffusers' own pipeline, batch by batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler

from conditional import CLASSES, classed
from guda_fast.diffusion.conditions import Conditions
from guda_fast.diffusion.sampling import sample_images
from tiny import tiny_unet

SCHEDULER = DDPMScheduler(num_train_timesteps=40, beta_schedule="squaredcos_cap_v2")


@pytest.mark.parametrize(("channels", "steps"), [(1, None), (3, 10)])
def test_pixels_are_those_of_the_pipeline(channels: int, steps: int | None) -> None:
    model = tiny_unet(channels)
    found = sample_images(model, SCHEDULER, 5, steps=steps, seed=7, batch_size=3)
    pipeline = DDPMPipeline(model, SCHEDULER)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    expected = [
        pipeline(batch_size=size, generator=generator, num_inference_steps=steps or 40, output_type="np").images
        for size in (3, 2)
    ]
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.round(np.concatenate(expected) * 255).astype(np.uint8))


def test_any_scheduler_with_the_same_noise_schedule_serves() -> None:
    ddim = DDIMScheduler.from_config(SCHEDULER.config)
    first, second = (sample_images(tiny_unet(), scheduler, 2, seed=1) for scheduler in (SCHEDULER, ddim))
    np.testing.assert_array_equal(first, second)


def test_each_image_has_its_own_condition() -> None:
    """The first image of each batch, whose noise comes first, is that of the label alone."""
    model, labels = classed(1), torch.arange(CLASSES)
    conditions = Conditions({"class_labels": labels}, row=torch.tensor([2, 1, 3]))
    found = sample_images(model, SCHEDULER, 3, seed=1, batch_size=3, conditions=conditions)
    same = [sample_images(model, SCHEDULER, 3, seed=1, conditions=conditions_of_one(label)) for label in (2, 1, 3)]
    np.testing.assert_array_equal(found, np.stack([images[i] for i, images in enumerate(same)]))
    assert not np.array_equal(same[0], same[1])
    with pytest.raises(ValueError, match="conditions must be those of 2 images, got 3"):
        sample_images(model, SCHEDULER, 2, conditions=conditions)


def conditions_of_one(label: int) -> Conditions:
    return Conditions({"class_labels": torch.tensor([label])}, row=torch.zeros(3, dtype=torch.int64))


def test_errors() -> None:
    for options, message in [
        ({"count": 0}, "count must be at least 1"),
        ({"steps": 41}, "steps must be between 1 and 40, got 41"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample_images(tiny_unet(), SCHEDULER, **{"count": 1, **options})
