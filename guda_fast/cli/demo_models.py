"""The models of the demo: a base, its unlearned copies and, on request, the LOGO oracles."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from guda_fast.counterfactuals import DenoisingObjective, Objective, ReTrackObjective, TrainConfig, TrainResult, train
from guda_fast.counterfactuals.runs import finished, save_run
from guda_fast.datasets import GroupedImages
from guda_fast.diffusion import Schedule

BATCH_SIZE = 64
RETRACK: dict[str, Any] = {"weight": 0.3, "neighbours": 10}


@dataclass(frozen=True)
class Recipe:
    """How the demo's models are made: optimiser steps of base and LOGO runs, of unlearning runs, and the seed."""

    steps: int
    unlearn_steps: int
    seed: int

    def from_scratch(self) -> TrainConfig:
        """Settings of base and LOGO trainings."""
        return TrainConfig(
            self.steps, lr=1e-3, warmup_steps=min(100, self.steps // 4), decay="cosine", ema_decay=0.995, seed=self.seed
        )

    def unlearning(self) -> TrainConfig:
        """Settings of unlearning runs."""
        return TrainConfig(self.unlearn_steps, lr=1e-4, seed=self.seed)


def digits_scheduler() -> Any:
    """The noise schedule of the demo: 1,000 steps, squared cosine."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")


def digits_unet(seed: int) -> nn.Module:
    """A UNet2DModel of 0.70 M parameters for 8x8 grey images, with weights drawn from ``seed``."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )
    return cast(nn.Module, model)


def _timed_training(
    name: str, start: nn.Module, objective: Objective, config: TrainConfig
) -> tuple[TrainResult, float]:
    """The result and its wall time. The bar is gone before the result is saved: Python ignores a Ctrl-C that
    arrives while an object is being freed."""
    with tqdm(total=config.steps, desc=f"train {name}", unit="step", dynamic_ncols=True) as bar:
        begin = time.perf_counter()
        result = train(start, objective, config, progress=lambda done, _: bar.update(done - bar.n))
        return result, time.perf_counter() - begin


class ModelStages:
    """Makes each model once, in a folder of its own below ``folder``; finished ones are reused.

    folder: gets base/, unlearned/<group>/ and logo/<group>/. data: the training images. recipe: see Recipe.
    """

    def __init__(self, folder: Path, data: GroupedImages, recipe: Recipe) -> None:
        self.folder = folder
        self.data = data
        self.recipe = recipe
        self.scheduler = digits_scheduler()
        self.schedule = Schedule.from_scheduler(self.scheduler)

    def base_hash(self) -> str:
        """A hash of the finished base's weights: what is made from another base is another run."""
        weights = (self.folder / "base" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        return hashlib.blake2b(weights, digest_size=16).hexdigest()

    def load_base(self) -> nn.Module:
        """The finished base model."""
        from diffusers import UNet2DModel

        model = UNet2DModel.from_pretrained(
            self.folder / "base" / "unet", local_files_only=True, low_cpu_mem_usage=False
        )
        return cast(nn.Module, model)

    def base(self) -> Path:
        """The full-data model, as a diffusers pipeline folder."""
        runs = [("base", self._without(None))]
        self._train(runs, digits_unet(self.recipe.seed), self.recipe.from_scratch(), {"objective": "denoising"})
        return self.folder / "base"

    def logo(self) -> dict[str, Path]:
        """One model a group, trained from scratch on all other groups."""
        runs = [(f"logo/{group}", self._without(group)) for group in self.data.groups]
        self._train(runs, digits_unet(self.recipe.seed), self.recipe.from_scratch(), {"objective": "denoising"})
        return {group: self.folder / "logo" / group for group in self.data.groups}

    def unlearned(self) -> dict[str, Path]:
        """One model a group: the base with the group unlearned by ReTrack."""
        settings = {**RETRACK, "objective": "retrack", "mode": "paper", "base": self.base_hash()}
        runs = [(f"unlearned/{group}", self._retrack(group)) for group in self.data.groups]
        self._train(runs, self.load_base(), self.recipe.unlearning(), settings)
        return {group: self.folder / "unlearned" / group for group in self.data.groups}

    def _without(self, group: str | None) -> Callable[[], Objective]:
        index = None if group is None else self.data.rest(group)
        return lambda: DenoisingObjective(self.data, self.schedule, index, batch_size=BATCH_SIZE)

    def _retrack(self, group: str) -> Callable[[], Objective]:
        return lambda: ReTrackObjective(self.data, group, self.schedule, batch_size=BATCH_SIZE, **RETRACK)

    def _train(
        self,
        runs: Iterable[tuple[str, Callable[[], Objective]]],
        start: nn.Module,
        config: TrainConfig,
        settings: dict[str, Any],
    ) -> None:
        settings = {"data": "digits", "batch_size": BATCH_SIZE, **settings, **asdict(config)}
        for name, objective in runs:
            if finished(self.folder / name, {"run": name, **settings}):
                continue
            result, seconds = _timed_training(name, start, objective(), config)
            model = self._as_pipeline(result.model) if name == "base" else result.model
            save_run(self.folder / name, model, {"run": name, **settings}, result.losses, seconds)

    def _as_pipeline(self, model: nn.Module) -> Any:
        from diffusers import DDPMPipeline

        return DDPMPipeline(model, self.scheduler)
