"""Features of images: in batches, of the UNet, of encoders in folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from conditional import MODELS, conditions_of
from guda_fast.baselines import embed, transformers_encoder, unet_features
from guda_fast.diffusion import query_id
from guda_fast.reference.add_noise import add_noise
from tiny import Scaled, tiny_unet

SCHEDULER = DDPMScheduler(num_train_timesteps=100)
MEAN, STD = [0.48, 0.45, 0.40], [0.26, 0.27, 0.28]


def images(count: int = 5, channels: int = 1) -> Tensor:
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_batches_do_not_matter_and_bad_embedders_are_named() -> None:
    def double(some: Tensor) -> Tensor:
        return 2 * some.flatten(1)

    torch.testing.assert_close(embed(images(), double, batch_size=2), 2 * images().flatten(1), rtol=0, atol=0)
    with pytest.raises(ValueError, match="embedder must give a tensor with a row for each of 5 images"):
        embed(images(), lambda some: some)
    with pytest.raises(ValueError, match="embedder must give finite features"):
        embed(images(), lambda some: double(some) / 0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        embed(images(), double, batch_size=0)


def test_unet_features_are_those_of_the_mid_block() -> None:
    model = tiny_unet()
    found = embed(images(), unet_features(model, SCHEDULER, timestep=30, seed=3))
    alpha = SCHEDULER.alphas_cumprod.double()[30]
    for row, image in enumerate(images().double()):
        number = np.array([query_id(image.float().numpy())], dtype=np.uint64).view(np.int64)
        counters = (torch.tensor([0]), torch.from_numpy(number), torch.tensor([30]), torch.tensor([0]))
        x_t = add_noise(image[None], *counters, alpha.sqrt()[None], (1 - alpha).sqrt()[None], seed=3)
        seen: list[Tensor] = []
        handle = model.mid_block.register_forward_hook(lambda *given, seen=seen: seen.append(given[2]))
        with torch.no_grad():
            model(x_t.float(), torch.tensor([30]))
        handle.remove()
        torch.testing.assert_close(found[row], seen[0].mean(dim=(2, 3))[0], rtol=1e-4, atol=1e-5)
    again = embed(images()[[3, 0]], unet_features(model, SCHEDULER, timestep=30, seed=3), batch_size=1)
    torch.testing.assert_close(again, found[[3, 0]], rtol=1e-4, atol=1e-5)
    assert not model.mid_block._forward_hooks


def test_unet_features_of_a_conditional_model_are_under_one_condition() -> None:
    model, given = MODELS["prompts"](), conditions_of("prompts", [1])
    condition = given.take(given.row)
    found = embed(images(3, 4), unet_features(model, SCHEDULER, condition=condition), batch_size=2)
    alone = torch.cat(
        [embed(image[None], unet_features(model, SCHEDULER, condition=condition)) for image in images(3, 4)]
    )
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    other = conditions_of("prompts", [0])
    changed = embed(images(3, 4), unet_features(model, SCHEDULER, condition=other.take(other.row)))
    assert not torch.allclose(changed, found, rtol=1e-3)


def test_what_has_no_middle_block_or_timestep_is_refused() -> None:
    with pytest.raises(ValueError, match="model must have a mid_block, got Scaled"):
        unet_features(Scaled(1.0), SCHEDULER)
    with pytest.raises(ValueError, match="timestep must be"):
        unet_features(tiny_unet(), SCHEDULER, timestep=100)


def save_encoder(folder: Path, kind: str) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    if kind == "clip":
        text = {**small, "vocab_size": 20, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0}
        vision = {**small, "image_size": 16, "patch_size": 8}
        model: nn.Module = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    else:
        model = ViTModel(ViTConfig(**small, image_size=16, patch_size=8))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return model.eval()


@pytest.mark.parametrize(("kind", "width"), [("clip", 6), ("vit", 16)])
@pytest.mark.parametrize("channels", [1, 3])
def test_encoders_see_normalised_squares(tmp_path, kind, width, channels) -> None:
    model = save_encoder(tmp_path / "encoder", kind)
    given = torch.nn.functional.interpolate(images(3, channels), (16, 16))  # of the encoder's size: nothing is resized
    found = embed(given, transformers_encoder(tmp_path / "encoder"), batch_size=2)
    pixels = (given.expand(-1, 3, -1, -1) + 1) / 2
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        if kind == "clip":
            expected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        else:
            expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    assert found.shape == (3, width)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert embed(images(2, channels), transformers_encoder(tmp_path / "encoder")).shape == (2, width)


def test_folders_that_are_no_encoders_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="missing: must be a transformers folder with config.json"):
        transformers_encoder(tmp_path / "missing")
    save_encoder(tmp_path / "encoder", "vit")
    for name in ("model.safetensors", "config.json"):
        file = tmp_path / "encoder" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="encoder: must hold a model that transformers loads, found none"):
            transformers_encoder(tmp_path / "encoder")
        file.write_bytes(whole)
    file = tmp_path / "encoder" / "preprocessor_config.json"
    file.write_text('{"image_mean": [0.5], "image_std": [0.5, 0.5, 0.5]}')
    with pytest.raises(
        ValueError, match=r"preprocessor_config.json: image_mean and image_std must be three numbers each"
    ):
        transformers_encoder(tmp_path / "encoder")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="with preprocessor_config.json, found none"):
        transformers_encoder(tmp_path / "encoder")
