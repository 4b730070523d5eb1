"""What the ladder measures: UNets with random weights, what unlearning might change in them, queries and a protocol."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from guda_fast import Protocol, Schedule
from guda_fast.deltas import Delta, Dense, LowRank

RELATIVE_CHANGE = 1e-2  # rms(delta) / rms(weight): what unlearning gives
RANKS = {"rank 4": 4, "rank 16": 16}
FORMS = ("dense", *RANKS)

PLAIN_DOWN, ATTENTION_DOWN = "DownBlock2D", "AttnDownBlock2D"
PLAIN_UP, ATTENTION_UP = "UpBlock2D", "AttnUpBlock2D"


class Prompted(nn.Module):
    """A conditional UNet under one prompt, so that it is called as an unconditional one.

    unet: a UNet2DConditionModel. tokens: of the prompt, whose embeddings are random.
    """

    prompt: Tensor

    def __init__(self, unet: Any, tokens: int) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("prompt", torch.randn(1, tokens, unet.config.cross_attention_dim))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        prompt = self.prompt.expand(len(sample), -1, -1)
        result: tuple[Tensor] = self.unet(sample, timestep, encoder_hidden_states=prompt, return_dict=return_dict)
        return result


@dataclass(frozen=True)
class Architecture:
    """A network, and what it is fed: make builds it with random weights; shape (C, H, W) and scheduler go with it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    scheduler: Callable[[], Any]

    def parameters(self) -> int:
        """How many parameters the network has."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.make().parameters())

    def flop_per_forward(self) -> int:
        """Multiplications and additions of one row."""
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.make().eval()(torch.empty(1, *self.shape), torch.zeros(1, dtype=torch.int64))
        return int(counter.get_total_flops())


def _unet(**config: Any) -> nn.Module:
    from diffusers import UNet2DModel  # heavy

    return cast(nn.Module, UNet2DModel(**config))


def _digits() -> nn.Module:
    from guda_fast.counterfactuals.networks import find_network, fitted, initial
    from guda_fast.datasets import load_digits

    return initial(fitted(find_network("digits").config, load_digits()), seed=0)


def _small(channels: tuple[int, int], size: int, groups: int) -> nn.Module:
    """The digits UNet in other widths, for colour images."""
    return _unet(
        sample_size=size,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=(PLAIN_DOWN, ATTENTION_DOWN),
        up_block_types=(ATTENTION_UP, PLAIN_UP),
        norm_num_groups=groups,
    )


def _ddpm_cifar10() -> nn.Module:
    """The architecture of google/ddpm-cifar10-32."""
    return _unet(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=(PLAIN_DOWN, ATTENTION_DOWN, PLAIN_DOWN, PLAIN_DOWN),
        up_block_types=(PLAIN_UP, PLAIN_UP, ATTENTION_UP, PLAIN_UP),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )


def _guda_cifar10() -> nn.Module:
    """The CIFAR-10 UNet of the GUDA paper's code, with the channels of a learned variance."""
    return _unet(
        sample_size=32,
        out_channels=6,
        layers_per_block=3,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=(PLAIN_DOWN, ATTENTION_DOWN, ATTENTION_DOWN, PLAIN_DOWN),
        up_block_types=(PLAIN_UP, ATTENTION_UP, ATTENTION_UP, PLAIN_UP),
    )


def _prompted(tokens: int, **config: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel  # heavy

    return Prompted(UNet2DConditionModel(in_channels=4, out_channels=4, **config), tokens)


def _stable_diffusion() -> nn.Module:
    return _prompted(77, sample_size=64, cross_attention_dim=768)


def _tiny_prompted() -> nn.Module:
    return _prompted(
        3,
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", PLAIN_DOWN),
        up_block_types=(PLAIN_UP, "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def _ddpm(**config: Any) -> Callable[[], Any]:
    def make() -> Any:
        from diffusers import DDPMScheduler  # heavy

        return DDPMScheduler(**config)

    return make


_COSINE = _ddpm(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
_LATENT = _ddpm(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)

ARCHITECTURES = {
    "digits": Architecture(_digits, (1, 8, 8), _COSINE),
    "rgb32": Architecture(lambda: _small((32, 64), 32, 8), (3, 32, 32), _COSINE),
    "ddpm-cifar10": Architecture(_ddpm_cifar10, (3, 32, 32), _ddpm()),
    "guda-cifar10": Architecture(
        _guda_cifar10, (3, 32, 32), _ddpm(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2")
    ),
    "sd15": Architecture(_stable_diffusion, (4, 64, 64), _LATENT),
    # For trying out and tests.
    "tiny": Architecture(lambda: _small((8, 16), 8, 4), (3, 8, 8), _COSINE),
    "tiny-prompted": Architecture(_tiny_prompted, (4, 8, 8), _LATENT),
}


@dataclass(frozen=True, eq=False)
class Workload:
    """A scoring job.

    base: [float32, on the CPU, eval mode]. deltas: one a counterfactual [K]. queries: [(N, C, H, W), float32, -1..1].
    protocol: the draws of every query. architecture: the key in ARCHITECTURES.
    """

    architecture: str
    base: nn.Module
    deltas: tuple[Delta, ...]
    protocol: Protocol
    queries: Tensor

    @property
    def models(self) -> int:
        """K + 1: the base and its counterfactuals."""
        return 1 + len(self.deltas)

    @property
    def rows(self) -> int:
        """Forwards of one model: queries times draws."""
        return len(self.queries) * self.protocol.draws

    def changed(self) -> list[str]:
        """The parameters that some counterfactual changes."""
        return sorted({name for delta in self.deltas for name in delta.parts})

    def weights(self, model: int) -> dict[str, Tensor]:
        """What model 0 (the base) or k + 1 has in the parameters of ``changed`` [float32, on the CPU]."""
        base = dict(self.base.named_parameters())
        parts = {} if model == 0 else self.deltas[model - 1].parts
        with torch.no_grad():
            return {
                name: parts[name].added_to(base[name], torch.float32) if name in parts else base[name]
                for name in self.changed()
            }

    def separate(self, model: int) -> nn.Module:
        """Model 0 or k + 1 as a module of its own."""
        module = copy.deepcopy(self.base)
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            for name, value in self.weights(model).items():
                parameters[name].copy_(value)
        return module

    def save(self, folder: Path) -> list[Path]:
        """Write the base and its counterfactuals as diffusers folders, in the order of their numbers."""
        targets = [folder / f"model_{model}" for model in range(self.models)]
        for model, target in enumerate(targets):
            module: Any = self.separate(model)
            module.save_pretrained(target)
        return targets


def make_workload(architecture: str, form: str, *, models: int, queries: int, draws: int, seed: int = 0) -> Workload:
    """A workload with weights, deltas and queries drawn from the seed.

    architecture: a key of ARCHITECTURES. form: of the deltas, one of FORMS: "dense" changes every parameter, a rank
    adds factors to all convolutions and to all Linear layers of the attention blocks (feed-forward ones too, where a
    block has them). models: K. queries: N. draws: timesteps, spread evenly over the schedule.
    """
    kind = ARCHITECTURES[architecture]
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = kind.make().eval().requires_grad_(False)
        _make_output_matter(base)
        deltas = tuple(Delta(dict(_parts(base, form)), f"group {k}") for k in range(models))
        x0 = torch.rand(queries, *kind.shape) * 2 - 1
    schedule = Schedule.from_scheduler(kind.scheduler())
    timesteps = np.linspace(10, len(schedule) - 10, draws).round().astype(int)
    return Workload(architecture, base, deltas, Protocol(schedule, tuple(timesteps.tolist())), x0)


def _make_output_matter(model: nn.Module) -> None:
    """Give the last convolution weights whose results are as large as noise: what it predicts then depends on all."""
    name = max(name for name, _ in model.named_modules() if name.endswith("conv_out"))
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Conv2d)
    layer.weight.normal_(std=layer.weight[0].numel() ** -0.5)


def _parts(model: nn.Module, form: str) -> Iterator[tuple[str, Dense | LowRank]]:
    if form == "dense":
        for name, parameter in model.named_parameters():
            # Zero biases change too, by as much as if they were small.
            scale = RELATIVE_CHANGE * max(_rms(parameter), 0.02)
            yield name, Dense(scale * torch.randn(parameter.shape))
        return
    rank = RANKS[form]
    for name in adapted_layers(model):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        scale = RELATIVE_CHANGE * _rms(weight) / rank**0.5
        yield f"{name}.weight", LowRank(torch.randn(len(weight), rank), scale * torch.randn(rank, *weight.shape[1:]))


def adapted_layers(model: nn.Module) -> list[str]:
    """The layers that low-rank deltas change: convolutions, and Linear layers of attention blocks."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and "attentions." in name)
    ]


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())
