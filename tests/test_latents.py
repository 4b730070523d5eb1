"""Latents: those of diffusers' pipelines, whatever the company, and a sample that its seed and query decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

import guda_fast as gf
from conditional import IMAGE, tiny_vae
from guda_fast.reference import standard_normals


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
    assert found.shape == (5, 4, IMAGE // 2, IMAGE // 2) and (
        latents.factor,
        latents.channels,
        latents.latent_channels,
    ) == (2, 3, 4)
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
    # The contract's noise where no protocol has a draw in use: the last timestep and the last sample of all.
    last = torch.full((5,), 65535)
    ids = torch.from_numpy(np.array(IDS, dtype=np.uint64).view(np.int64))
    eps = standard_normals(ids, last, last, found[0].numel(), seed=7).view(found.shape)
    torch.testing.assert_close(found, posterior.mean + posterior.std * eps, rtol=1e-5, atol=1e-5)
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


def test_the_record_tells_configurations_apart() -> None:
    """The same weights under another factor give other latents."""
    record = gf.Latents(tiny_vae()).to_dict()
    for other in (tiny_vae(scaling_factor=1.7), tiny_vae(shift_factor=0.3)):
        assert gf.Latents(other).to_dict() != record


def test_a_latent_that_is_not_finite_is_named(images) -> None:
    broken = images.clone()
    broken[3] = torch.inf
    latents = gf.Latents(tiny_vae())
    with pytest.raises(FloatingPointError, match="latents must be finite, got NaN or infinity for query 3"):
        latents.encode(broken, IDS)
    with pytest.raises(FloatingPointError, match=r"for query dog\.png"):
        latents.encode(broken, IDS, ["a", "b", "c", "dog.png", "e"])


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
