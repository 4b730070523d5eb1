"""Latents: what a latent model sees of an image, by the encoder of a VAE."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guda_fast._validate import check_choice, check_int, describe
from guda_fast.datasets.encoders import component, frozen, networks_hash
from guda_fast.diffusion.protocol import MAX_INDEX
from guda_fast.reference import standard_normals

MODES = ("mode", "sample")


class Latents:
    """Makes latents of images: x0 = (z - shift_factor) scaling_factor, z the mode of the VAE's posterior or a sample.

    Images are encoded one by one in float32, so that a latent does not depend on its company.

    vae: the folder of a pipeline or of its ``vae/``; or an AutoencoderKL or another VAE of diffusers whose encoder
        gives a distribution, which is used as and where it is
    mode: "mode", or "sample": mean + std eps, eps by the noise contract at the query's id, timestep and sample 65,535
    seed: of "sample" [0..2^64-1]. device: of a VAE that is loaded [CUDA where there is one]

    Raises TypeError or ValueError naming the argument; FileNotFoundError where the folder has no VAE.
    Source: Rombach et al. 2022 for the scale; diffusers' pipelines for the factors.

    >>> gf.attribute(images, bank, protocol, conditions=text(prompts), latents=gf.Latents("sd15"))  # doctest: +SKIP
    """

    def __init__(
        self,
        vae: str | os.PathLike[str] | nn.Module,
        *,
        mode: str = "mode",
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self.mode = check_choice("Latents", "mode", mode, MODES)
        self.seed = check_int("Latents", "seed", seed, 0, 2**64 - 1)
        self._vae = vae if isinstance(vae, nn.Module) else _load(vae, device)
        config = getattr(self._vae, "config", None)
        needed = ("in_channels", "latent_channels", "block_out_channels", "scaling_factor")
        if any(getattr(config, name, None) is None for name in needed) or not hasattr(self._vae, "encode"):
            raise TypeError(f"Latents: vae must be a VAE of diffusers or its folder, got {type(self._vae).__name__}")
        if getattr(config, "latents_mean", None) is not None or getattr(config, "latents_std", None) is not None:
            raise ValueError(
                "Latents: vae must scale its latents by scaling_factor and shift_factor, got one with latents_mean or "
                "latents_std; pass its latents as queries"
            )
        self._config: Any = config

    @property
    def channels(self) -> int:
        """Of the images that it takes."""
        return int(self._config.in_channels)

    @property
    def latent_channels(self) -> int:
        """Of the latents that it makes."""
        return int(self._config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels of an image for each of its latent, in height and in width."""
        return int(2 ** (len(self._config.block_out_channels) - 1))

    @torch.no_grad()
    def encode(self, images: Tensor, ids: Sequence[int], names: Sequence[str] | None = None) -> Tensor:
        """The latents of images.

        images: pixels in [-1, 1] [(N, C, H, W), float32]. ids: of the queries, for the noise of "sample" [N].
        names: of the queries, for messages [N; their positions by default].
        Returns latents [(N, c, H / factor, W / factor), float32, on the CPU]. Raises FloatingPointError naming the
        query whose latent has NaN or infinity, as of a VAE in half precision.
        """
        if len(images) != len(ids):
            raise ValueError(f"Latents: ids must hold one id an image ({len(images)}), got {describe(ids)}")
        names = [str(index) for index in range(len(ids))] if names is None else names
        queries = zip(images, ids, names, strict=True)
        return torch.cat([self._encode(image[None], number, name) for image, number, name in queries])

    def to_dict(self) -> dict[str, Any]:
        """What latents depend on, as JSON values."""
        seed = {"seed": self.seed} if self.mode == "sample" else {}
        return {"vae": self._hash, "mode": self.mode, **seed}

    @cached_property
    def _hash(self) -> str:
        return networks_hash(self._vae)

    def _encode(self, image: Tensor, number: int, name: str) -> Tensor:
        vae: Any = self._vae
        like = next(self._vae.parameters())
        posterior = getattr(vae.encode(image.to(like.device, like.dtype)), "latent_dist", None)
        if posterior is None:
            raise TypeError(f"Latents: vae must give a distribution, got {type(vae).__name__}, which gives latents")
        z: Tensor = posterior.mode().float().cpu()
        if self.mode == "sample":
            counter = torch.tensor([MAX_INDEX])
            query = torch.from_numpy(np.array([number], dtype=np.uint64).view(np.int64))
            eps = standard_normals(query, counter, counter, z.numel(), seed=self.seed)
            z = z + posterior.std.float().cpu() * eps.view(z.shape)
        scaled: Tensor = (z - (self._config.get("shift_factor") or 0.0)) * self._config.scaling_factor
        if not scaled.isfinite().all():
            raise FloatingPointError(f"Latents: latents must be finite, got NaN or infinity for query {name}")
        return scaled


def _load(folder: str | os.PathLike[str], device: torch.device | str | None) -> nn.Module:
    from diffusers import AutoencoderKL  # heavy

    path = component("Latents", folder, "vae")
    from_pretrained: Any = AutoencoderKL.from_pretrained
    return frozen(from_pretrained(path, local_files_only=True), device)
