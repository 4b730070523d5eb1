"""Small denoisers for tests: a UNet of a few thousand parameters, and closed-form ones."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def tiny_unet(channels: int = 1, out_channels: int | None = None, size: int = 8, seed: int = 0) -> nn.Module:
    """A UNet2DModel with random weights."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=out_channels or channels,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )
    return model.eval()


def perturbed(model: nn.Module, scale: float = 0.01, seed: int = 1) -> nn.Module:
    """A copy with normal noise on every parameter."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return other


class Scaled(nn.Module):
    """Predicts factor * x_t, so that scores have a closed form; takes any number of channels."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.factor * sample,)
