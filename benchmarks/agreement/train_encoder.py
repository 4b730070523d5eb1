"""A small ViT trained on a data set's images without labels, as an encoder for similarity.

    python -m benchmarks.agreement.train_encoder digits runs/encoder --rows benchmarks/results/train_encoder.csv

Contrastive learning (SimCLR, Chen et al. 2020): two random views of an image, turned, scaled, shifted, in another
contrast and with noise, should have more similar features than views of different images. OUT is then a transformers
folder that ``guda_fast.baselines.transformers_encoder`` and ``guda-fast compare --method encoder,folder=OUT`` take. A
fifth of the images is held out, for what is printed in the end: how many of them a vote of the ten nearest other images
gives their group, by these features and by pixels. Groups are used for nothing else. The same seed and number of
threads give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTModel

from benchmarks.provenance import provenance, write_rows
from guda_fast.baselines import embed, transformers_encoder
from guda_fast.datasets import GroupedImages, open_dataset

TEMPERATURE, WIDTH, HELD_OUT, NEAREST = 0.2, 64, 5, 10
DEGREES, SCALE, SHIFT, NOISE, CONTRAST = 15.0, 0.15, 0.125, 0.1, 0.3


def views(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned, scaled, shifted (by a share of its side), in another contrast and with noise.

    images: [(B, C, H, W), float32, in [-1, 1]]. Returns the same shape, not clamped.
    """
    count = len(images)

    def even(limit: float) -> Tensor:
        return (2 * torch.rand(count, generator=generator) - 1) * limit

    angle, scale = even(math.radians(DEGREES)), 1 + even(SCALE)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # Places are in -1 to 1: a shift by a share of the side is twice that.
    rows = (torch.stack([cos, -sin, even(2 * SHIFT)], dim=1), torch.stack([sin, cos, even(2 * SHIFT)], dim=1))
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    noise = NOISE * torch.randn(moved.shape, generator=generator)
    return moved * (1 + even(CONTRAST))[:, None, None, None] + noise


def contrast_loss(first: Tensor, second: Tensor) -> Tensor:
    """NT-Xent: each view should find the other of its image among all views of the batch.

        mean over views i of -log( exp(cos(i, pair of i) / T) / sum over j != i of exp(cos(i, j) / T) )

    first, second: features of the two views of each image [(B, F) each]
    """
    count = len(first)
    features = functional.normalize(torch.cat([first, second]), dim=1)
    cosines = (features @ features.T / TEMPERATURE).fill_diagonal_(-math.inf)
    return functional.cross_entropy(cosines, torch.arange(2 * count).roll(count))


def trained(
    images: Tensor, mean: Tensor, std: Tensor, *, patch: int, layers: int, steps: int, batch: int, seed: int
) -> ViTModel:
    """The encoder, after so many steps on the images [(N, 3, S, S), float32, in [-1, 1]].

    mean, std: of the pixels in 0..1 by channel [(3,) each]
    """
    config = ViTConfig(
        image_size=images.shape[-1],
        patch_size=patch,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ViTModel(config).train()
        head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH // 2))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps + 1)
    shift, scale = mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)
    for step in range(steps):
        some = images[torch.randperm(len(images), generator=generator)[:batch]]
        pair = torch.cat([views(some, generator), views(some, generator)])
        first = model(pixel_values=(pair / 2 + 0.5 - shift) / scale).last_hidden_state[:, 0]
        loss = contrast_loss(*head(first).chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def vote_accuracy(known: Tensor, groups: Tensor, asked: Tensor, expected: Tensor) -> float:
    """The share of images whose ten nearest neighbours by cosine vote for their group; the lower one where even."""
    cosines = functional.normalize(asked.flatten(1), dim=1) @ functional.normalize(known.flatten(1), dim=1).T
    nearest = cosines.topk(min(NEAREST, len(known)), dim=1).indices
    return float((groups[nearest].mode(dim=1).values == expected).float().mean())


def groups_of(data: GroupedImages) -> Tensor:
    """The number of each image's group, the first that has it; -1 of images in none [(N,), int64]."""
    found = torch.full((len(data),), -1)
    for number, index in reversed(list(enumerate(data.members.values()))):
        found[index] = number
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a name or a folder, as --data of guda-fast")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--patch", type=int, default=2, help="of the ViT; must divide the side")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="a CSV file for what is printed in the end")
    given = parser.parse_args()
    data = open_dataset(given.data)
    images = data.take(torch.arange(len(data)))
    height, width = images.shape[2:]
    if height != width or height % given.patch:
        parser.error(f"images must be squares whose side --patch divides, got {height} x {width} and {given.patch}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(given.seed))
    held, known = order[: len(order) // HELD_OUT].sort().values, order[len(order) // HELD_OUT :].sort().values
    # Grey images are three equal channels, as transformers_encoder makes of them.
    pixels = images[known].expand(-1, 3, -1, -1)
    mean, std = (pixels / 2 + 0.5).mean(dim=(0, 2, 3)), (pixels / 2 + 0.5).std(dim=(0, 2, 3))
    begin = time.process_time()
    model = trained(
        pixels, mean, std, **{name: getattr(given, name) for name in ("patch", "layers", "steps", "batch", "seed")}
    )
    shared = {"data": given.data, "training_cpu_s": f"{time.process_time() - begin:.0f}", "neighbours": NEAREST}
    model.save_pretrained(given.out)
    normalisation = {"image_mean": mean.tolist(), "image_std": std.tolist()}
    (given.out / "preprocessor_config.json").write_text(json.dumps(normalisation) + "\n", encoding="utf-8")

    groups = groups_of(data)
    features = embed(images, transformers_encoder(given.out))
    rows: list[dict[str, object]] = []
    for name, values in (("features", features), ("pixels", images)):
        accuracy = vote_accuracy(values[known], groups[known], values[held], groups[held])
        print(f"{NEAREST} nearest neighbours by {name}: {accuracy:.4f} of {len(held)} held-out images")
        rows.append({"of": name, **shared, "images": len(held), "accuracy": f"{accuracy:.4f}"})
    if given.rows is not None:
        command = f"python -m benchmarks.agreement.train_encoder {' '.join(sys.argv[1:])}"
        write_rows(given.rows, [{**row, **provenance(), "command": command} for row in rows])


if __name__ == "__main__":
    main()
