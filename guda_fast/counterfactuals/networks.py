"""Networks to train from scratch, by name or from a file, sized to their data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guda_fast._json import read_object
from guda_fast.counterfactuals.students import Inputs, forward
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.deltas.formats.diffusers import build_model, complete_config
from guda_fast.errors import CheckpointError

_WHERE = "network"
_COSINE = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
_LINEAR = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}


@dataclass(frozen=True)
class Network:
    """An architecture, the noise schedule that suits it, and how it is trained unless the caller says otherwise.

    config: diffusers' configuration. scheduler: diffusers' configuration. training: fields of ``TrainConfig``.
    batch_size: [>= 1].
    """

    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    training: Mapping[str, Any]
    batch_size: int = 64

    def trained(self, **given: Any) -> dict[str, Any]:
        """Fields of ``TrainConfig``: those given before the network's own, whose warm-up takes a quarter at most.

        >>> NETWORKS["digits"].trained(steps=40)["warmup_steps"]
        10
        """
        fields = {**self.training, **given}
        if "warmup_steps" not in given and isinstance(fields["steps"], int):
            fields["warmup_steps"] = min(fields["warmup_steps"], fields["steps"] // 4)
        return fields


_SMALL_TRAINING = {"steps": 3000, "lr": 1e-3, "warmup_steps": 100, "decay": "cosine", "ema_decay": 0.995}

NETWORKS: Mapping[str, Network] = {
    # 0.70 M parameters for images of 8x8.
    "digits": Network(
        {
            "_class_name": "UNet2DModel",
            "layers_per_block": 1,
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 8,
        },
        _COSINE,
        _SMALL_TRAINING,
    ),
    # The same with a stage of 16 channels before it: at 16x16 about half as much work again as digits at 8x8.
    "small": Network(
        {
            "_class_name": "UNet2DModel",
            "layers_per_block": 1,
            "block_out_channels": (16, 32, 64),
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            "norm_num_groups": 8,
        },
        _COSINE,
        _SMALL_TRAINING,
    ),
    # The network of Ho et al. 2020 for CIFAR-10, with their schedule, rate and average.
    "ddpm-cifar10": Network(
        {
            "_class_name": "UNet2DModel",
            "layers_per_block": 2,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": None,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
        },
        _LINEAR,
        {"steps": 800_000, "lr": 2e-4, "warmup_steps": 5000, "ema_decay": 0.9999},
        batch_size=128,
    ),
}


def find_network(name: str) -> Network:
    """A network by its name, or the diffusers configuration in a JSON file, trained as the small ones are.

    Raises ValueError naming the choices, or what is wrong with the file.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    path = Path(name)
    if path.suffix != ".json":
        raise ValueError(f"{_WHERE}: must be one of {', '.join(NETWORKS)}, or a .json file, got {name!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{_WHERE}: must be a diffusers configuration, found no file {path}")
    return Network(read_object(path), _COSINE, _SMALL_TRAINING)


def fitted(config: Mapping[str, Any], data: GroupedImages) -> dict[str, Any]:
    """The complete configuration of a network for these images and class labels.

    Channels, size and number of classes are the data's where the configuration does not say them.
    """
    channels, height, width = data.images.shape[1:]
    sized: dict[str, Any] = {
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": channels,
    }
    if data.conditions is not None and "class_labels" in data.conditions.tensors:
        labels: Any = data.conditions.tensors["class_labels"]
        sized["num_class_embeds"] = int(labels.max()) + 1
    # A class may not know num_class_embeds; build_model says so.
    merged = {**sized, **config}
    model = build_model(merged, _WHERE)
    return complete_config(type(model), merged)


def initial(config: Mapping[str, Any], seed: int) -> nn.Module:
    """The untrained network, its weights drawn from ``seed``; torch's own random state stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(config, _WHERE)


def check_fits(where: str, model: nn.Module, data: GroupedImages) -> None:
    """Raise CheckpointError where a model takes other images than the data's, or other conditions.

    where: the model's origin, for the message
    """
    config: Any = getattr(model, "config", {})
    channels, height, width = data.images.shape[1:]
    wanted = config.get("in_channels")
    if wanted is not None and wanted != channels:
        raise CheckpointError(f"{where}: the base must take the data's {channels} channels, found one for {wanted}")
    size = config.get("sample_size")
    size = (size, size) if isinstance(size, int) else size
    if size is not None and tuple(size) != (height, width):
        raise CheckpointError(
            f"{where}: the base must take the data's {height}x{width} images, found one for {size[0]}x{size[1]}"
        )
    _check_conditions(where, model, data)
    _check_forward(where, model, data)


def _check_forward(where: str, model: nn.Module, data: GroupedImages) -> None:
    """One image through the model: a size that its stages do not halve evenly shows only there."""
    parameter = next(model.parameters())
    channels, height, width = data.images.shape[1:]
    x_t = torch.zeros(1, channels, height, width, device=parameter.device, dtype=parameter.dtype)
    t = torch.zeros(1, dtype=torch.int64, device=parameter.device)
    condition: Mapping[str, Any] = {}
    if data.conditions is not None and data.conditions.tensors:
        condition = data.conditions.to(parameter.device, parameter.dtype).take(t)
    try:
        with torch.no_grad(), torch.random.fork_rng():  # which dropout draws from
            found = forward(model, Inputs(x_t, t, condition)).shape
        why = None if found == x_t.shape else f"an output of {found[-2]}x{found[-1]}"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = f"that {str(error).splitlines()[0]}"
    if why is not None:
        stages = getattr(model, "config", {}).get("block_out_channels")
        even = f", whose height and width must be multiples of {2 ** (len(stages) - 1)}" if stages else ""
        raise CheckpointError(
            f"{where}: the network must take the data's {channels}x{height}x{width} images{even}, found {why}"
        )


def _check_conditions(where: str, model: nn.Module, data: GroupedImages) -> None:
    from guda_fast.datasets.conditions import check_conditions
    from guda_fast.diffusion.conditions import Conditions

    conditions = Conditions.none(len(data)) if data.conditions is None else data.conditions
    try:
        check_conditions(model, conditions)
    except ValueError as error:
        raise CheckpointError(f"{where}: the base must take the conditions of the data, found that {error}") from error
