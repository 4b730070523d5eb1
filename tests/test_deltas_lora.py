"""LoRA files of diffusers and of kohya's scripts: read, and as diffusers itself computes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from adapter_cases import State, check_forwards, check_weights, conditional, randomised, read_lora
from guda_fast.deltas import DeltaBank, Source

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYWHERE = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv_in", "time_emb_proj"]
OLD = {".lora_A.": "_lora.down.", ".lora_B.": "_lora.up.", ".to_out.0_lora": ".to_out_lora", ".to_": ".processor.to_"}


def trained(targets: list[str], make: Callable[[], nn.Module] = conditional, **config: Any) -> Any:
    """A diffusers model with an adapter whose values are those of a long training."""
    net: Any = make()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 3, "target_modules": targets, **config}))
    randomised(net, seed=3, only="lora_")
    return randomised(net, seed=3, only="modules_to_save.")


def factors_of(net: Any) -> State:
    """The adapter's own tensors, under PEFT's keys."""
    return {key: value for key, value in get_peft_model_state_dict(net).items() if ".lora_" in key}


def loaded(source: Path | State, make: Callable[[], nn.Module] = conditional, scale: float | None = None) -> nn.Module:
    """A model into which diffusers loaded a file or a state dict as its pipelines do."""
    net: Any = make()
    given = source if isinstance(source, Path) else dict(source)
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        given, unet_config=net.config, return_lora_metadata=True
    )
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, net, adapter_name="g", metadata=metadata)
    if scale is not None:
        net.set_adapters("g", scale)
    return net.eval()


def kohya(state: State, alpha: Callable[[str], float]) -> State:
    """diffusers' conversion, which knows no alpha but the rank, with an alpha for each module."""
    found = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in state.items()})
    return {k: torch.tensor(alpha(k)) if k.endswith(".alpha") else value for k, value in found.items()}


def old(state: State) -> State:
    """The keys of diffusers before 0.22, whose factors were in attention processors."""
    found = {}
    for key, value in state.items():
        for new, former in OLD.items():
            key = key.replace(new, former)
        found[key] = value
    return found


def test_adapters_that_diffusers_saved(tmp_path: Path) -> None:
    net = trained(EVERYWHERE, rank_pattern={"conv1": 2}, alpha_pattern={"to_k": 9}, modules_to_save=["conv_out"])
    net.save_lora_adapter(tmp_path)
    theirs: Any = conditional()
    theirs.load_lora_adapter(tmp_path, prefix=None, adapter_name="default", use_safetensors=True)
    base = conditional()
    bank = DeltaBank.load(base, {"g": tmp_path / "pytorch_lora_weights.safetensors"})
    check_weights(base, bank, theirs)
    check_forwards(base, bank, theirs)


@pytest.mark.parametrize(
    ("change", "targets", "stated", "scale"),
    [
        # The conversion knows attention only, and diffusers does not read what it makes of others beside it.
        (convert_state_dict_to_diffusers, ATTENTION, True, -0.5),
        (convert_state_dict_to_diffusers, ATTENTION, False, 1.0),
        (dict, EVERYWHERE, True, 1.0),
        (dict, EVERYWHERE, False, 0.3),
    ],
)
def test_files_of_pipelines(
    tmp_path: Path, change: Callable[[State], State], targets: list[str], stated: bool, scale: float
) -> None:
    net = trained(targets, use_rslora=True, rank_pattern={"to_k": 2})
    config = net.peft_config["default"].to_dict() if stated else None
    StableDiffusionPipeline.save_lora_weights(tmp_path, change(factors_of(net)), unet_lora_adapter_metadata=config)
    base = conditional()
    path = tmp_path / "pytorch_lora_weights.safetensors"
    bank = DeltaBank.load(base, {"g": Source(path, scale=scale)})
    assert bank.deltas[0].origin == (str(path) if scale == 1 else f"{path} (scale {scale:g})")
    check_weights(base, bank, loaded(path, scale=scale))


def test_files_of_transformers(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        )  # fmt: skip

    with torch.random.fork_rng():
        net = trained([*ATTENTION, "add_k_proj", "proj_out"], make)
        StableDiffusion3Pipeline.save_lora_weights(tmp_path, factors_of(net))
        path = tmp_path / "pytorch_lora_weights.safetensors"
        theirs: Any = make()
        theirs.load_lora_adapter(path, prefix="transformer")
        base = make()
    check_weights(base, DeltaBank.load(base, {"g": path}), theirs)


def test_files_before_peft(tmp_path: Path) -> None:
    state = old(factors_of(trained(ATTENTION)))
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight" in state
    theirs = loaded({f"unet.{key}": value for key, value in state.items()})
    base = conditional()
    torch.save(state, tmp_path / "pytorch_lora_weights.bin")
    for source in (tmp_path / "pytorch_lora_weights.bin", state, {f"unet.{k}": v for k, v in state.items()}):
        check_weights(base, DeltaBank.load(base, {"g": source}), theirs)


def test_files_of_kohya(tmp_path: Path) -> None:
    net = trained(EVERYWHERE, rank_pattern={"conv1": 2})
    state = kohya(factors_of(net), lambda key: 5.0 if "conv1" in key or "_ff_" in key else 3.0)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight" in state
    path = tmp_path / "style.safetensors"
    safetensors.torch.save_file(state, path, metadata={"ss_network_dim": "4", "ss_network_alpha": "3"})
    base, theirs = conditional(), loaded(path)
    bank = DeltaBank.load(base, {"g": path})
    check_weights(base, bank, theirs)
    check_forwards(base, bank, theirs)


def test_alphas_are_those_of_the_modules() -> None:
    """diffusers 0.42 gives attention layers the commonest alpha of the file; kohya's scripts give them their own."""
    net = trained(["to_q", "conv1"])
    state = kohya(factors_of(net), lambda key: 6.0 if "attn1_to_q" in key else 2.0)
    del state["lora_unet_mid_block_resnets_0_conv1.alpha"]
    base = conditional()
    factors = read_lora(state, base).factors
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    up = state["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"]
    assert torch.equal(factors[f"{module}.weight"].read().up, up * (6 / 4))
    with pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match any targeted module"):
        assert loaded(state).get_submodule(module).scaling["g"] == 2 / 4
    # Without an alpha it is the rank, which makes no scale.
    up = state["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"]
    assert torch.equal(factors["mid_block.resnets.0.conv1.weight"].read().up, up[..., 0, 0])


# Of a UNet like SDXL's, in the names of Stable Diffusion's own code.
ORIGINAL = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_out_layers_3": "down_blocks.0.resnets.1.conv2",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_emb_layers_1": "down_blocks.1.resnets.0.time_emb_proj",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_5_1_transformer_blocks_1_attn1_to_q": "down_blocks.1.attentions.1.transformer_blocks.1.attn1.to_q",
    "middle_block_0_in_layers_2": "mid_block.resnets.0.conv1",
    "middle_block_1_transformer_blocks_0_attn2_to_k": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "middle_block_1_transformer_blocks_0_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_0_1_transformer_blocks_0_attn1_to_v": "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v",
    "output_blocks_2_1_transformer_blocks_1_attn2_to_out_0": (
        "up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_out.0"
    ),
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_3_0_skip_connection": "up_blocks.1.resnets.0.conv_shortcut",
    "output_blocks_5_0_out_layers_3": "up_blocks.1.resnets.2.conv2",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}


def like_sdxl() -> nn.Module:
    return conditional(
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )


def test_files_of_kohya_for_sdxl() -> None:
    base: Any = like_sdxl()
    random = torch.Generator().manual_seed(0)
    state: State = {}
    for original, module in ORIGINAL.items():
        out, *inner = base.get_submodule(module).weight.shape
        state[f"lora_unet_{original}.lora_down.weight"] = torch.randn(3, *inner, generator=random)
        state[f"lora_unet_{original}.lora_up.weight"] = torch.randn(out, 3, *(1 for _ in inner[1:]), generator=random)
        state[f"lora_unet_{original}.alpha"] = torch.tensor(2.0)
    theirs: Any = like_sdxl()
    found, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(state), unet_config=theirs.config)
    StableDiffusionXLPipeline.load_lora_into_unet(found, alphas, theirs)
    bank = DeltaBank.load(base, {"g": state})
    assert bank.survey("g").support == {f"{module}.weight": "low-rank" for module in ORIGINAL.values()}
    check_weights(base, bank, theirs.eval())
