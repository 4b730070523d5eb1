"""Models, images and options for the tests of the CIFAR frontend."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from tiny import perturbed, tiny_unet

IMAGES, BATCH = 7, 3
# Low timesteps, where the float32 alpha_bar of 4000 steps is coarsest, and a few high ones.
LOW = ["--timesteps", "4000", "--skip", "10", "--max_t", "50", "--batch", str(BATCH)]
SPREAD = ["--timesteps", "4000", "--skip", "700", "--batch", str(BATCH)]


def save_models(folder: Path, out_channels: int) -> Path:
    """A base, and for each class an unlearned and a left-out model."""
    scheduler = DDPMScheduler(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2")
    base = tiny_unet(3, out_channels)
    for number in range(-1, 10):
        target = folder / ("base" if number < 0 else f"unlearned/unlearn_class_{number}/latest")
        model = base if number < 0 else perturbed(base, 0.01, seed=number)
        model.save_pretrained(target)
        scheduler.save_pretrained(target)
        torch.save({"epoch": 3}, target / "training_state.pt")
        if number >= 0:
            (folder / f"logo/exclude_{number}").mkdir(parents=True)
            # Other models than the unlearned one of this class.
            (folder / f"logo/exclude_{number}/epoch_1200").symlink_to(
                (folder / f"unlearned/unlearn_class_{(number + 3) % 10}/latest").absolute()
            )
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Forwards are so small that several threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"), 3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 8, 8, 3), dtype=np.uint8)
    pixels[4] = pixels[1]  # whose noise is another, all the same
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"image_{number:04d}.png")
    Image.fromarray(pixels[0]).save(folder / "preview.png")
    return folder


def unlearned(models: Path, images: Path, out: Path, *options: str) -> list[str]:
    paths = {"gen_dir": images, "ckpt_base": models / "base", "ckpt_unlearned": models / "unlearned", "output_dir": out}
    return [*(word for name, path in paths.items() for word in (f"--{name}", str(path))), *options]


def rows_of(path: Path) -> list[list[str]]:
    content = path.read_bytes()
    assert content.count(b"\r\n") == content.count(b"\n") > 0
    return list(csv.reader(content.decode().splitlines()))
