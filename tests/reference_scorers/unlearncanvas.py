"""UnlearnCanvas with Stable Diffusion: one noise tensor for all images, a loop over styles, batches and timesteps."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer


class Scorer:
    """The parts of the pipeline in ``model``, the latents and embedded prompts of all images, and their noise.

    Latents are the modes of the VAE's posteriors: sampled ones would be others in each run.
    noise_dtype: that the noise is drawn in. amp: the dtype that the UNet runs in under autocast, None for float32.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Path,
        image_dir: Path,
        prompts_file: Path,
        *,
        timesteps: Sequence[int],
        samples: int = 1,
        seed: int = 42,
        noise_dtype: torch.dtype = torch.bfloat16,
        amp: torch.dtype | None = None,
    ) -> None:
        self.model, self.timesteps, self.amp = model, timesteps, amp
        self.scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
        vae = AutoencoderKL.from_pretrained(model / "vae", low_cpu_mem_usage=False).eval()
        tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder").eval()
        prompts = {}
        for line in prompts_file.read_text().splitlines():
            entry = json.loads(line)
            prompts[entry["style"].replace(" ", "_"), entry["object"]] = entry["prompt"]
        self.about: list[tuple[str, str, str]] = []
        latents, embeds = [], []
        for path in sorted(image_dir.glob("*/*.png"), key=lambda path: (path.parent.name, path.name)):
            style = path.parent.name
            thing = path.stem.removeprefix(style.replace(" ", "_") + "_")
            self.about.append((style, thing, str(path.relative_to(image_dir))))
            pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255
            latents.append(vae.encode(2 * pixels[None] - 1).latent_dist.mode() * vae.config.scaling_factor)
            text = tokenizer(
                [prompts[style.replace(" ", "_"), thing]],
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            embeds.append(text_encoder(text.input_ids)[0])
        self.latents, self.embeds = torch.cat(latents), torch.cat(embeds)
        torch.manual_seed(seed)
        self.noise = torch.randn(samples, len(timesteps), *self.latents.shape, dtype=noise_dtype)

    def load(self, path: Path) -> UNet2DConditionModel:
        if path.is_dir():
            folder = path / "unet" if (path / "unet").is_dir() else path
            return UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()
        unet = UNet2DConditionModel.from_pretrained(self.model / "unet", low_cpu_mem_usage=False)
        unet.load_state_dict(torch.load(path, weights_only=False)["unet_state_dict"])
        return unet.eval()

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(x_{t-1} | x_t, x0), in float32."""
        bar, previous = self.scheduler.alphas_cumprod[t], self.scheduler.alphas_cumprod[t - 1]
        beta = 1 - bar / previous
        variance = beta * (1 - previous) / (1 - bar)
        of_x0 = previous.sqrt() * beta / (1 - bar)
        of_x_t = bar.sqrt() * (1 - previous) / (1 - bar)
        return of_x0 * x0 + of_x_t * x_t, variance

    @torch.no_grad()
    def elbo(self, unet: UNet2DConditionModel, batch: int) -> Tensor:
        """Minus the sum of all divergences, averaged over samples [(N,), float32]."""
        parts = []
        for first in range(0, len(self.latents), batch):
            part = slice(first, first + batch)
            x0, embeds = self.latents[part], self.embeds[part]
            total = torch.zeros(len(x0))
            for sample in self.noise:
                for t, eps in zip(self.timesteps, sample[:, part], strict=True):
                    steps = torch.full((len(x0),), t)
                    x_t = self.scheduler.add_noise(x0, eps.float(), steps)
                    with torch.autocast("cpu", self.amp, enabled=self.amp is not None):
                        out = unet(x_t, steps, encoder_hidden_states=embeds).sample.float()
                    bar = self.scheduler.alphas_cumprod[t]
                    predicted_x0 = (x_t - (1 - bar).sqrt() * out) / bar.sqrt()
                    true_mean, variance = self.posterior_mean(x0, x_t, t)
                    model_mean, _ = self.posterior_mean(predicted_x0, x_t, t)
                    total -= 0.5 * ((true_mean - model_mean) ** 2 / variance).flatten(1).sum(1)
            parts.append(total / len(self.noise))
        return torch.cat(parts)

    def write_scores(self, target: Path, base: Path, groups: dict[str, Path], column: str, *, batch: int = 8) -> None:
        """The CSV of all images under all groups, whose models are loaded one after the other."""
        of_base = self.elbo(self.load(base), batch)
        with open(target, "w", newline="") as file:
            fields = ["generated_style", "object_name", "attribution_style", column, "image_path"]
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            for group in sorted(groups):
                scores = of_base - self.elbo(self.load(groups[group]), batch)
                for (style, thing, path), score in zip(self.about, scores.tolist(), strict=True):
                    writer.writerow(dict(zip(fields, (style, thing, group, score, path), strict=True)))
