"""Original Stable Diffusion checkpoints: the same model as diffusers' own loader makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from guda_fast.deltas import DeltaBank, Source
from guda_fast.errors import CheckpointError
from ldm import UNET, original, tiny_conditional_unet
from tiny import perturbed, tiny_unet

diffusers = pytest.importorskip("diffusers")
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return tiny_conditional_unet()


@pytest.fixture(scope="module")
def other(base: torch.nn.Module) -> torch.nn.Module:
    return perturbed(base)


@pytest.fixture
def checkpoint(other: torch.nn.Module) -> State:
    """A whole checkpoint: the UNet, parts of what comes with it, and the average that Lightning's script keeps."""
    state = original(other.state_dict())
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1 for name, tensor in state.items()
    }
    return {
        **state,
        **averages,
        "model_ema.decay": torch.tensor(0.99),
        "first_stage_model.decoder.conv_in.weight": torch.ones(2, 2),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(4),
        "betas": torch.ones(10),
        "alphas_cumprod_prev": torch.ones(10),
        "sqrt_recipm1_alphas_cumprod": torch.ones(10),
        "log_one_minus_alphas_cumprod": torch.ones(10),
        "posterior_log_variance_clipped": torch.ones(10),
    }


def test_checkpoints_become_what_diffusers_makes_of_them(
    base: torch.nn.Module, other: torch.nn.Module, checkpoint: State, tmp_path: Path
) -> None:
    base.save_pretrained(tmp_path / "base")
    safetensors.torch.save_file(checkpoint, path := tmp_path / "sd.safetensors")
    torch.save({"state_dict": checkpoint, "global_step": 7}, tmp_path / "sd.ckpt")
    theirs = diffusers.UNet2DConditionModel.from_single_file(str(path), config=str(tmp_path / "base"))
    sources = {"theirs": theirs, "file": path, "ckpt": tmp_path / "sd.ckpt", "memory": checkpoint, "module": other}
    bank = DeltaBank.load(tmp_path / "base", sources)
    assert len(set(bank.delta_hashes.values())) == 1
    with bank.applied("file") as model:
        for name, tensor in theirs.state_dict().items():
            # theta_0 + (theta_k - theta_0): one rounding of each.
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=2**-22, atol=2**-24)


def test_the_moving_average_is_taken_when_asked_for(base: torch.nn.Module, checkpoint: State) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    theirs = convert_ldm_unet_checkpoint(dict(checkpoint), base.config, extract_ema=True)
    assert sum(name.startswith("model_ema") for name in checkpoint) > 100  # or diffusers takes the weights themselves
    bank = DeltaBank.load(base, {"theirs": theirs, "ours": Source(checkpoint, weights="ema"), "raw": checkpoint})
    assert bank.delta_hashes["ours"] == bank.delta_hashes["theirs"] != bank.delta_hashes["raw"]
    del checkpoint["model_ema.diffusion_modelout0bias"]
    with pytest.raises(CheckpointError, match="key 'model_ema.diffusion_modelout0bias' is missing, which has the mov"):
        DeltaBank.load(base, {"g": Source(checkpoint, weights="ema")})


@pytest.mark.parametrize("layer", ["attn2.to_k", "up_blocks.1.resnets.1", "mid_block", "down_blocks.1"])
def test_some_of_the_parameters(base: torch.nn.Module, other: torch.nn.Module, layer: str) -> None:
    """Blocks must get their numbers also where most of them are not in the file."""
    part = {name: tensor for name, tensor in other.state_dict().items() if layer in name}
    bank = DeltaBank.load(base, {"diffusers": part, "original": {"state_dict": original(part)}})
    assert bank.delta_hashes["diffusers"] == bank.delta_hashes["original"]
    assert bank.survey("original").support.keys() == part.keys()


def test_keys_that_the_conversion_passes_over_are_refused(base: torch.nn.Module, checkpoint: State) -> None:
    whole = {name: tensor for name, tensor in checkpoint.items() if name.startswith(UNET)}
    part = {name: tensor for name, tensor in whole.items() if "attn2.to_k" in name}
    unknown, lost = f"{UNET}input_blocks.1.0.extra.weight", f"{UNET}label_emb.0.0.weight"
    without = {name: tensor for name, tensor in whole.items() if name != f"{UNET}out.2.bias"}
    many = {f"{UNET}input_blocks.{i}.0.x": torch.ones(1) for i in range(900)}
    for state, message in [
        ({**checkpoint, lost: torch.ones(1)}, f"key '{lost}' is not one that diffusers' conversion knows"),
        ({**checkpoint, unknown: torch.ones(1)}, r"key 'down_blocks.0.resnets.0.extra.weight' is not in the base"),
        ({**checkpoint, "control.x": torch.ones(1)}, "key 'control.x' is not one of an original Stable Diffusion"),
        ({**part, "embed": torch.ones(1)}, "key 'embed' changes the text encoder, which the base does not hold"),
        ({**part, "cond_stage_model.x": torch.ones(1)}, "key 'cond_stage_model.x' changes the text encoder"),
        (without, "key 'conv_out.bias' is missing"),
        (many, "must have the base's 208 keys in model.diffusion_model.*, found 900"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            DeltaBank.load(base, {"g": state})


def test_other_bases_are_refused(checkpoint: State) -> None:
    for base, found in [(tiny_unet(), "UNet2DModel"), (torch.nn.Linear(2, 2), "a module without a configuration")]:
        with pytest.raises(
            CheckpointError, match=f"the base must be a UNet2DConditionModel of diffusers, found {found}"
        ):
            DeltaBank.load(base, {"g": checkpoint})
