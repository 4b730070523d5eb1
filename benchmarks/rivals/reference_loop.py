"""R0: the loop that research code for these scores runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guda_fast import Protocol
from guda_fast.diffusion.schedule import FloatArray


class ReferenceLoop:
    """Batch of images by batch, model by model, timestep by timestep: eager, float32, channels-first.

    At every timestep it forms the true and the model's posterior mean in float32, and the KL divergence of the two
    Gaussians in float64, from tables that are copied to the device at each use. A counterfactual is loaded from disk
    for every batch of images. Noise is its own: a generator seeded for the batch gives every model the same.

    folders: of the saved models, the base first. protocol: one sample a timestep; its order is reversed here.
    batch: images a forward. reload: load the counterfactuals once instead, where a case has so few timesteps
    that loading would weigh more than in the whole job.

    Source: the description in performance.md and formats.md of the GUDA paper's public scorer.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        protocol: Protocol,
        *,
        batch: int = 64,
        device: torch.device | str = "cpu",
        seed: int = 42,
        reload: bool = True,
    ) -> None:
        if protocol.samples != 1 or protocol.schedule.prediction_type != "epsilon":
            raise ValueError("ReferenceLoop: protocol must have one sample a timestep and epsilon predictions")
        self._folders, self._timesteps = list(folders), protocol.timesteps[::-1]
        self._batch, self._device, self._seed = batch, torch.device(device), seed
        self._tables = _tables(protocol.schedule.betas)
        self._base = self._load(self._folders[0])
        self._kept = None if reload else [self._load(folder) for folder in self._folders[1:]]

    @torch.no_grad()
    def scores(self, queries: Tensor) -> FloatArray:
        """Scores [(N, K), float64] of queries [(N, C, H, W), float32]."""
        parts = []
        for start in range(0, len(queries), self._batch):
            images = queries[start : start + self._batch].to(self._device)
            seed = batch_seed(start, self._seed)
            base = self._divergence(self._base, images, seed)
            columns = []
            for k, folder in enumerate(self._folders[1:]):
                model = self._load(folder) if self._kept is None else self._kept[k]
                columns.append(self._divergence(model, images, seed) - base)
            parts.append(torch.stack(columns, dim=1).cpu().numpy())
        return np.concatenate(parts)

    def _load(self, folder: Path) -> Any:
        from diffusers import UNet2DModel
        from diffusers.utils.import_utils import is_accelerate_available

        # The quicker way of the two, where its package is there.
        model = UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=is_accelerate_available())
        return model.to(self._device).eval()

    def _divergence(self, model: Any, x0: Tensor, seed: int) -> Tensor:
        """KL(true posterior || the model's) in nats, summed over timesteps and pixels [(B,), float64]."""
        generator = torch.Generator(self._device).manual_seed(seed)
        total = torch.zeros(len(x0), dtype=torch.float64, device=self._device)
        for step in self._timesteps:
            t = torch.full((len(x0),), step, device=self._device)
            eps = torch.randn(x0.shape, generator=generator, device=self._device)
            x_t = self._at("signal", t) * x0 + self._at("sigma", t) * eps
            predicted = model(x_t, t).sample[:, : x0.shape[1]]
            predicted_x0 = self._at("recip_signal", t) * x_t - self._at("recip_sigma", t) * predicted
            true_mean, true_log_variance = self._posterior(x0, x_t, t)
            model_mean, model_log_variance = self._posterior(predicted_x0, x_t, t)
            divergence = _gaussian_kl(
                true_mean.double(), true_log_variance.double(), model_mean.double(), model_log_variance.double()
            )
            total += divergence.flatten(1).sum(1)
        return total

    def _posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(x_{t-1} | x_t, x_0)."""
        mean = self._at("mean_x0", t) * x0 + self._at("mean_x_t", t) * x_t
        return mean, self._at("log_variance", t)

    def _at(self, table: str, t: Tensor) -> Tensor:
        return torch.from_numpy(self._tables[table]).to(t.device)[t].float()[:, None, None, None]


def batch_seed(start: int, seed: int) -> int:
    """The seed of a batch of images, from the name of its first one."""
    digest = hashlib.sha256(f"image_{start:05d}.png_{seed}".encode()).hexdigest()
    return int(digest, 16) % 2**32


def _tables(betas: FloatArray) -> dict[str, FloatArray]:
    """Ho et al. 2020, equations 4, 7 and 15, for all timesteps [(T,), float64 each]."""
    alpha_bar = np.cumprod(1 - betas)
    previous = np.append(1.0, alpha_bar[:-1])
    variance = betas * (1 - previous) / (1 - alpha_bar)
    return {
        "signal": np.sqrt(alpha_bar),
        "sigma": np.sqrt(1 - alpha_bar),
        "recip_signal": np.sqrt(1 / alpha_bar),
        "recip_sigma": np.sqrt(1 / alpha_bar - 1),
        "mean_x0": betas * np.sqrt(previous) / (1 - alpha_bar),
        "mean_x_t": (1 - previous) * np.sqrt(1 - betas) / (1 - alpha_bar),
        # The variance of the first timestep is zero.
        "log_variance": np.log(np.append(variance[1], variance[1:])),
    }


def _gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, e^log_variance1) || N(mean2, e^log_variance2)), element for element."""
    return 0.5 * (
        -1.0
        + log_variance2
        - log_variance1
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    )
