"""Queries for the agreement experiments: images that a base generates, with their classes where it has any.

    python -m benchmarks.sample_queries runs/digits/base runs/digits/queries --count 256 --seed 1

Writes PNG files, and with --labels L, for a class-conditional base, OUT.jsonl with the label of each, 0..L-1 in turn.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from guda_fast.diffusion.conditions import Conditions
from guda_fast.diffusion.sampling import sample_images


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--labels", type=int, help="labels to draw from, without the null label")
    parser.add_argument("--steps", type=int, help="denoising steps [all of them]")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"OUT must not be there already, found {given.out}")
    model = UNet2DModel.from_pretrained(given.base / "unet", local_files_only=True)
    scheduler = DDPMScheduler.from_pretrained(given.base / "scheduler", local_files_only=True)
    conditions = None
    if given.labels is not None:
        row = torch.arange(given.count) % given.labels
        conditions = Conditions({"class_labels": torch.arange(given.labels)}, row=row)
    pixels = sample_images(
        model, scheduler, given.count, steps=given.steps, seed=given.seed, batch_size=64, conditions=conditions
    )
    names = [f"{index:04d}.png" for index in range(given.count)]
    part = given.out.with_name(f".{given.out.name}")  # what is there under its own name is whole
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(part / name)
    if conditions is not None:
        lines = [json.dumps({"file_name": n, "label": r}) for n, r in zip(names, conditions.row.tolist(), strict=True)]
        given.out.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.rename(given.out)


if __name__ == "__main__":
    main()
