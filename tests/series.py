"""A small series of runs for tests: random images in groups, a UNet of a few thousand parameters, a few steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guda_fast.counterfactuals import DenoisingObjective, Objective, TrainConfig, TrainResult
from guda_fast.datasets import GroupedImages
from guda_fast.diffusion import Schedule
from tiny import tiny_unet

NETWORK = {
    "_class_name": "UNet2DModel",
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}


def network_file(folder: Path) -> Path:
    """The configuration of ``tiny_unet`` without the sizes that data give."""
    path = folder / "network.json"
    path.write_text(json.dumps(NETWORK))
    return path


def random_groups(count: int = 3, each: int = 4, size: int = 8) -> GroupedImages:
    """Groups a, b, c ... of random grey images."""
    images = torch.rand(count * each, 1, size, size, generator=torch.Generator().manual_seed(5)) * 2 - 1
    labels = torch.arange(count).repeat_interleave(each)
    return GroupedImages.by_label(images, labels, [chr(ord("a") + k) for k in range(count)])


def schedule() -> Schedule:
    from diffusers import DDPMScheduler

    return Schedule.from_scheduler(DDPMScheduler(num_train_timesteps=50))


@dataclass
class FewRuns:
    """One run a group, on all other images.

    hook: called with the name when a run's objective is made.
    """

    steps: int = 3
    count: int = 3
    extra: Mapping[str, Any] = field(default_factory=dict)
    hook: Callable[[str], object] = lambda name: None
    configs: Mapping[str, TrainConfig] = field(default_factory=dict)

    @cached_property
    def data(self) -> GroupedImages:
        return random_groups(self.count)

    @property
    def names(self) -> tuple[str, ...]:
        return self.data.groups

    @property
    def record(self) -> Mapping[str, Any]:
        return {"overlaps": []}

    @cached_property
    def start(self) -> nn.Module:
        return tiny_unet()

    def config(self, name: str) -> TrainConfig:
        return self.configs.get(name, TrainConfig(self.steps))

    def settings(self, name: str) -> dict[str, Any]:
        return {"run": name, "steps": self.config(name).steps, **self.extra}

    def objective(self, name: str) -> Objective:
        self.hook(name)
        return DenoisingObjective(self.data, schedule(), self.data.rest(name), batch_size=4)

    def write(self, name: str, result: TrainResult, folder: Path) -> None:
        result.save(folder)


@dataclass(frozen=True)
class FewRunsOrder:
    """Opens ``FewRuns`` in any process."""

    steps: int = 3
    count: int = 3

    def open(self) -> FewRuns:
        return FewRuns(self.steps, self.count)


@dataclass(frozen=True)
class GoneOrder:
    """Cannot be opened."""

    def open(self) -> FewRuns:
        raise FileNotFoundError("no images any more")


def weights(out: Path) -> dict[str, bytes]:
    """The weights of every finished run below a folder."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*.safetensors"))
        if not any(part.startswith(".") for part in path.relative_to(out).parts)
    }
