"""CIFAR-10: a loop over batches of images, classes and timesteps, with posterior means in float32."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

NAMES = ["airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Scorer:
    """The base, its scheduler's tables, and what is common to the scorer and the cache writer.

    dtype: of the forwards; below float32 they run under autocast.
    """

    def __init__(
        self,
        ckpt_base: Path,
        *,
        timesteps: int,
        skip: int = 10,
        min_t: int = 1,
        max_t: int | None = None,
        seed: int = 42,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.base = load_model(ckpt_base)
        self.scheduler = DDPMScheduler.from_pretrained(ckpt_base)
        last = timesteps - 1 if max_t is None else max_t
        self.timesteps = [t for t in range(0, timesteps, skip) if min_t <= t <= last][::-1]
        self.seed, self.dtype = seed, dtype
        betas = self.scheduler.betas.numpy().astype(np.float64)
        bar = self.scheduler.alphas_cumprod.numpy().astype(np.float64)
        previous = np.concatenate([[1.0], bar[:-1]])
        variance = betas * (1 - previous) / (1 - bar)
        self.tables = {
            "log_variance": np.log(np.maximum(variance, 1e-20)),
            "of_x0": betas * np.sqrt(previous) / (1 - bar),
            "of_x_t": (1 - previous) * np.sqrt(1 - betas) / (1 - bar),
            "inverse_signal": np.sqrt(1 / bar),
            "inverse_ratio": np.sqrt(1 / bar - 1),
        }

    def table(self, name: str, t: Tensor) -> Tensor:
        return torch.from_numpy(self.tables[name])[t].float().view(-1, 1, 1, 1)

    def noise(self, paths: Sequence[Path], x0: Tensor) -> dict[int, Tensor]:
        torch.manual_seed(seed_of(paths[0], self.seed))
        return {t: torch.randn(x0.shape) for t in self.timesteps}

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.table("of_x0", t) * x0 + self.table("of_x_t", t) * x_t

    def divergence(self, model: UNet2DModel, x0: Tensor, step: int, eps: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) of each image, summed over its elements [(B,), float64]."""
        t = torch.full((len(x0),), step, dtype=torch.int64)
        x_t = self.scheduler.add_noise(x0, eps, t)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            out = model(x_t, t).sample
        predicted = out.float()[:, : x0.shape[1]]
        predicted_x0 = self.table("inverse_signal", t) * x_t - self.table("inverse_ratio", t) * predicted
        true_mean, model_mean = self.posterior_mean(x0, x_t, t), self.posterior_mean(predicted_x0, x_t, t)
        log_variance = self.table("log_variance", t).expand_as(x0)
        return gaussian_kl(true_mean.double(), log_variance.double(), model_mean.double(), log_variance.double())

    @torch.no_grad()
    def scores(self, paths: Sequence[Path], models: dict[int, Path], *, batch: int = 64, classes: int = 10) -> Tensor:
        """ELBO differences [(N, classes), float32], zero for a class without a model."""
        scores = torch.zeros(len(paths), classes)
        for first, part in batches(paths, batch):
            x0 = load_images(part)
            eps = self.noise(part, x0)
            base = {t: self.divergence(self.base, x0, t, eps[t]) for t in self.timesteps}
            for number, folder in models.items():
                model = load_model(folder)
                total = torch.zeros(len(part))
                for t in self.timesteps:
                    total += (self.divergence(model, x0, t, eps[t]) - base[t]).float()
                scores[first : first + len(part), number] = total
        return scores

    @torch.no_grad()
    def write_cache(self, path: Path, paths: Sequence[Path], *, batch: int = 128) -> None:
        """The base's divergences in an .npz file, with a pickled config."""
        divergences = np.zeros((len(paths), len(self.timesteps)), dtype=np.float32)
        for first, part in batches(paths, batch):
            x0 = load_images(part)
            eps = self.noise(part, x0)
            for index, t in enumerate(self.timesteps):
                divergences[first : first + len(part), index] = self.divergence(self.base, x0, t, eps[t]).numpy()
        np.savez_compressed(
            path,
            kl_base=divergences,
            image_paths=np.array([str(image) for image in paths]),
            timesteps=np.array(self.timesteps),
            seed=self.seed,
            config={"skip": 10},
        )


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    kl = log_variance2 - log_variance1 - 1 + torch.exp(log_variance1 - log_variance2)
    kl = kl + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * kl.flatten(1).sum(1)


def load_model(folder: Path) -> UNet2DModel:
    return UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()


def load_images(paths: Sequence[Path]) -> Tensor:
    pixels = [np.array(Image.open(path).convert("RGB")) for path in paths]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255 * 2 - 1


def find_images(folder: Path) -> list[Path]:
    return sorted(folder.glob("image_*.png"))


def batches(paths: Sequence[Path], size: int) -> Iterator[tuple[int, Sequence[Path]]]:
    for first in range(0, len(paths), size):
        yield first, paths[first : first + size]


def seed_of(path: Path, seed: int) -> int:
    return int(hashlib.sha256(f"{path.name}_{seed}".encode()).hexdigest(), 16) % 2**32


def write_tables(target: Path, paths: Sequence[Path], scores: Tensor) -> None:
    """``target`` with a row a cell, and ``*_sorted.csv`` with a row an image."""
    classes = scores.shape[1]
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "class_id", "delta_elbo"])
        for path, row in zip(paths, scores, strict=True):
            for number in range(classes):
                writer.writerow([str(path), number, row[number].item()])
    with open(str(target).replace(".csv", "_sorted.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["image"] + [f"R{rank + 1}_{what}" for rank in range(classes) for what in ("Cls", "Name", "Sc")]
        )
        for path, row in zip(paths, scores.tolist(), strict=True):
            line: list[object] = [os.path.basename(path)]
            for number in sorted(range(classes), key=lambda number: row[number], reverse=True):
                line += [number, f"{number}: {NAMES[number]}", formatted(row[number])]
            writer.writerow(line)


def formatted(score: float) -> str:
    if score != 0 and abs(score) < 1e-6:
        return f"{score:.6e}"
    return f"{score:.6f}" if abs(score) < 1e-3 else f"{score:.4f}"
