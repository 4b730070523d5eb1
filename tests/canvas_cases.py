"""Models, images and prompts for the tests of the UnlearnCanvas frontend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from conditional import IMAGE, prompted, save_pipeline
from tiny import perturbed

STYLES = ("Blue Ink", "Cubism", "Warm Smear")
OBJECTS = ("Cat", "Two_Trees")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Forwards are so small that several threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_checkpoint(path: Path, unet: torch.nn.Module, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(unet.parameters()).state_dict()
    content = {"unet_state_dict": unet.state_dict(), "optimizer_state_dict": optimizer, "step": step}
    torch.save({**content, "args": {"lr": 1e-6}}, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, all/, unlearned/ (.pt files, one a diffusers folder), logo/, images/ and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("canvas")
    unet = prompted()
    save_pipeline(folder / "model", unet)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.save_pretrained(folder / "model/scheduler")
    base = perturbed(unet, 0.02, seed=1)
    save_checkpoint(folder / "all/checkpoint_step_300.pt", base, 300)
    base.save_pretrained(folder / "all/checkpoint-301/unet")
    for number, style in enumerate(STYLES):
        save_checkpoint(folder / f"unlearned/{style}/checkpoint_step_200.pt", perturbed(base, 0.01, 10 + number), 200)
        perturbed(base, 0.01, 20 + number).save_pretrained(folder / f"logo/{style}/checkpoint-301/unet")
    shutil.rmtree(folder / "unlearned/Cubism")
    perturbed(base, 0.01, 11).save_pretrained(folder / "unlearned/Cubism/checkpoint_step_200")
    random = np.random.default_rng(5)
    lines = []
    for style in STYLES:
        (folder / "images" / style).mkdir(parents=True)
        for thing in OBJECTS:
            pixels = random.integers(0, 256, (IMAGE, IMAGE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"images/{style}/{style.replace(' ', '_')}_{thing}.png")
            lines.append({"style": style, "object": thing, "prompt": f"{thing[:3]} as {style[:2]}".lower()})
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder
