"""Small conditional denoisers, and what they are conditioned on, for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import guda_fast as gf
from guda_fast.diffusion.conditions import Conditions
from guda_fast.reference import add_noise
from tiny import perturbed

TOKENS, FEATURES, POOLED = 5, 12, 10
CLASSES = 4


def randomised(make: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """With random values also where layers begin with zeros, which hide what is not used."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(**options)
    return perturbed(model.eval(), 0.05, seed=9)


def prompted(**options: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    sizes: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8}
    return randomised(
        UNet2DConditionModel,
        **{**sizes, "norm_num_groups": 4, "cross_attention_dim": FEATURES, "attention_head_dim": 4},
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **options,
    )


def prompted_xl() -> nn.Module:
    return prompted(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + POOLED,
        use_linear_projection=True,
    )


def classed(channels: int = 4) -> nn.Module:
    from diffusers import UNet2DModel

    return randomised(
        UNet2DModel,
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=CLASSES,
    )


def conditions_of(name: str, row: list[int], count: int = 3) -> Conditions:
    """Random conditions for one of MODELS."""
    random = torch.Generator().manual_seed(4)
    tensors: dict[str, Any] = {}
    if name == "classes":
        tensors["class_labels"] = torch.arange(count) + 1
    else:
        tensors["encoder_hidden_states"] = torch.randn(count, TOKENS, FEATURES, generator=random)
    if name == "prompts, added":
        times = torch.tensor([[64, 48, 0, 0, 64, 48]]) + torch.arange(count)[:, None]
        tensors["added_cond_kwargs"] = {"text_embeds": torch.randn(count, POOLED, generator=random), "time_ids": times}
    return Conditions(tensors, torch.tensor(row))


MODELS: Mapping[str, Callable[[], nn.Module]] = {"prompts": prompted, "prompts, added": prompted_xl, "classes": classed}


@torch.no_grad()
def loop_errors(
    model: nn.Module, x0: Tensor, ids: tuple[int, ...], conditions: Conditions, protocol: gf.Protocol
) -> np.ndarray:
    """w_t || prediction - target ||^2 of every query and draw, in float64, one row at a time [(N, D)]."""
    table = protocol.table
    numbers = torch.from_numpy(np.array(ids, dtype=np.uint64).view(np.int64))
    errors = np.empty((len(x0), len(table)))
    for i, query in enumerate(x0.double()):
        given = conditions.to(torch.device("cpu"), torch.float64).take(conditions.row[i : i + 1])
        for d in range(len(table)):
            draw = [torch.tensor([column[d]]) for column in (table.timestep, table.sample)]
            counters = (torch.tensor([0]), numbers[i : i + 1], *draw)

            def mixed(a: float, b: float, query: Tensor = query, counters: Any = counters) -> Tensor:
                scales = [torch.tensor([value], dtype=torch.float64) for value in (a, b)]
                return add_noise(query[None], *counters, *scales, seed=protocol.seed)

            x_t = mixed(table.x0_scale[d], table.eps_scale[d])
            target = mixed(table.target_x0_scale[d], table.target_eps_scale[d])
            time = torch.tensor([table.model_timestep[d]])
            prediction = model(x_t, timestep=time, **given, return_dict=False)[0]
            errors[i, d] = table.weight[d] * float((prediction - target).square().sum())
    return errors


WORDS = 9  # tokens of a prompt
IMAGE = 16  # pixels of a side; latents have half of them


def tiny_tokenizer() -> Any:
    """Each letter is a token."""
    from transformers import CLIPTokenizer

    letters = [*map(chr, range(ord("a"), ord("z") + 1))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=WORDS)


def tiny_text_encoder(projected: bool = False, features: int = FEATURES, seed: int = 0) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54, hidden_size=features, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=WORDS, bos_token_id=52, eos_token_id=53, pad_token_id=53, projection_dim=POOLED,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def tiny_vae(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            sample_size=IMAGE,
            **options,
        ).eval()


def save_pipeline(folder: Path, unet: nn.Module) -> None:
    """What diffusers saves of a Stable Diffusion pipeline, as far as scoring needs it."""
    from diffusers import DDPMScheduler

    parts = {
        "unet": unet,
        "vae": tiny_vae(),
        "text_encoder": tiny_text_encoder(),
        "tokenizer": tiny_tokenizer(),
        "scheduler": DDPMScheduler(num_train_timesteps=100),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
