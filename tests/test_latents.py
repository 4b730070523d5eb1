"""Latents: those of diffusers' pipelines, whatever the company, and a sample that its seed and query decide."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

import guda_fast as gf
from conditional import IMAGE, tiny_vae


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand((5, 3, IMAGE, IMAGE), generator=torch.Generator().manual_seed(0)) * 2 - 1


IDS = (3, 2**64 - 1, 17, 5, 0)


@torch.no_grad()
@pytest.mark.parametrize("shift", [None, 0.3])
def test_the_mode_scaled_and_shifted(images, shift: float | None) -> None:
    vae = tiny_vae(scaling_factor=1.7, shift_factor=shift)
    latents = gf.Latents(vae)
    found = latents.encode(images, IDS)
    wanted = torch.cat([(vae.encode(image[None]).latent_dist.mode() - (shift or 0)) * 1.7 for image in images])
    assert torch.equal(found, wanted)
    assert found.shape == (5, 4, IMAGE // 2, IMAGE // 2) and latents.factor == 2 and latents.channels == 3
    assert torch.equal(latents.encode(images[3:4], IDS[3:4]), found[3:4])
    assert set(latents.to_dict()) == {"vae", "mode"}


@torch.no_grad()
def test_a_sample_depends_on_its_seed_and_query_alone(images) -> None:
    vae = tiny_vae(scaling_factor=1.0)
    sample = gf.Latents(vae, mode="sample", seed=7)
    found = sample.encode(images, IDS)
    assert torch.equal(sample.encode(images[[2, 0]], [17, 3]), found[[2, 0]])
    for other in (gf.Latents(vae, mode="sample", seed=8).encode(images, IDS), sample.encode(images, [9, 8, 7, 6, 1])):
        assert (other != found).flatten(1).any(dim=1).all()
    posterior = vae.encode(images).latent_dist
    eps = ((found - posterior.mean) / posterior.std).flatten().double().numpy()
    # 1280 standard normals: the mean and the second moment within four standard errors.
    assert abs(eps.mean()) < 4 / math.sqrt(eps.size)
    assert abs(np.square(eps).mean() - 1) < 4 * math.sqrt(2 / eps.size)
    assert sample.to_dict()["seed"] == 7 and sample.to_dict() != gf.Latents(vae, mode="sample", seed=8).to_dict()


def test_folders_and_modules_are_the_same(tmp_path, images) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    one, two, three = (
        gf.Latents(tmp_path, device="cpu"),
        gf.Latents(tmp_path / "vae", device="cpu"),
        gf.Latents(tiny_vae()),
    )
    assert torch.equal(one.encode(images, IDS), two.encode(images, IDS))
    assert torch.equal(one.encode(images, IDS), three.encode(images, IDS))
    assert one.to_dict() == three.to_dict() != gf.Latents(tiny_vae(latent_channels=8)).to_dict()


def test_what_does_not_fit(tmp_path, images) -> None:
    with pytest.raises(FileNotFoundError, match="must be a pipeline saved by diffusers, or its vae"):
        gf.Latents(tmp_path)
    with pytest.raises(TypeError, match="vae must be a VAE of diffusers or its folder, got Linear"):
        gf.Latents(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="vae must give a distribution, got AutoencoderTiny, which gives latents"):
        small = AutoencoderTiny(
            encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )  # fmt: skip
        gf.Latents(small).encode(images, IDS)
    with pytest.raises(ValueError, match="mode must be one of 'mode', 'sample', got 'mean'"):
        gf.Latents(tiny_vae(), mode="mean")
    with pytest.raises(ValueError, match="seed must be between 0 and 18446744073709551615, got -1"):
        gf.Latents(tiny_vae(), seed=-1)
    with pytest.raises(ValueError, match="must scale its latents by scaling_factor and shift_factor"):
        gf.Latents(tiny_vae(latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4))
    with pytest.raises(ValueError, match=r"ids must hold one id an image \(5\)"):
        gf.Latents(tiny_vae()).encode(images, IDS[:2])
