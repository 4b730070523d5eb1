"""The original Stable Diffusion code's names for the parameters of diffusers' UNet."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

UNET = "model.diffusion_model."
_TOP = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
_TOP |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
_RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def tiny_conditional_unet(seed: int = 0) -> nn.Module:
    """A UNet2DConditionModel with random weights, with and without attention in its blocks."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=8,
        )
    return model.eval()


def original(state: Mapping[str, Tensor], layers: int = 1) -> dict[str, Tensor]:
    """A UNet's tensors under the original names; ``layers``: its layers_per_block."""
    attention = {name.split(".")[1] for name in state if name.startswith("up_blocks") and ".attentions." in name}
    return {UNET + _renamed(name, layers, attention): tensor for name, tensor in state.items()}


def _renamed(name: str, layers: int, attention: set[str]) -> str:
    if found := _BLOCK.fullmatch(name):
        way, block, kind, layer, rest = found.groups()
        at = int(block) * (layers + 1) + int(layer)
        if kind == "downsamplers":
            return f"input_blocks.{1 + at + layers}.0.op{rest.removeprefix('conv')}"
        if kind == "upsamplers":
            return f"output_blocks.{at + layers}.{2 if block in attention else 1}.{rest}"
        start = f"input_blocks.{1 + at}" if way == "down" else f"output_blocks.{at}"
        return f"{start}.{_inside(kind, rest)}"
    if found := _MIDDLE.fullmatch(name):
        kind, layer, rest = found.groups()
        at = 2 * int(layer) if kind == "resnets" else 1
        return f"middle_block.{at}.{_inside(kind, rest).split('.', 1)[1]}"
    stem = next(stem for stem in _TOP if name.startswith(f"{stem}."))
    return _TOP[stem] + name.removeprefix(stem)


def _inside(kind: str, rest: str) -> str:
    if kind == "attentions":
        return f"1.{rest}"
    stem, _, end = rest.partition(".")
    return f"0.{_RESNET[stem]}.{end}"
