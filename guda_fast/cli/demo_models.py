"""The models of the demo: a base, its unlearned copies and, on request, the LOGO oracles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from guda_fast.cli.runs import Progress
from guda_fast.counterfactuals.config import TrainConfig
from guda_fast.counterfactuals.networks import NETWORKS, fitted
from guda_fast.counterfactuals.queue import complete
from guda_fast.counterfactuals.recipes import BASE, BaseRecipe, Retraining, Series, Unlearning, UnlearningRecipe
from guda_fast.counterfactuals.runs import finished
from guda_fast.datasets import GroupedImages
from guda_fast.datasets.encoders import networks_hash
from guda_fast.deltas.base import open_base

_NETWORK = NETWORKS["digits"]


@dataclass(frozen=True)
class Recipe:
    """How the demo's models are made: optimiser steps of base and LOGO runs, of unlearning runs, and the seed."""

    steps: int
    unlearn_steps: int
    seed: int

    def from_scratch(self, data: GroupedImages) -> BaseRecipe:
        """Of base and LOGO trainings."""
        training = TrainConfig(**_NETWORK.trained(steps=self.steps, seed=self.seed))
        return BaseRecipe(fitted(_NETWORK.config, data), dict(_NETWORK.scheduler), training)

    def unlearning(self) -> UnlearningRecipe:
        """Of unlearning runs."""
        return UnlearningRecipe("retrack", steps=self.unlearn_steps, options={"seed": self.seed})


class ModelStages:
    """Makes each model once, in a folder of its own below ``folder``; finished ones are reused.

    folder: gets base/, unlearned/<group>/ and logo/<group>/. data: the training images. recipe: see Recipe.
    """

    def __init__(self, folder: Path, data: GroupedImages, recipe: Recipe) -> None:
        self.folder, self.data, self.recipe = folder, data, recipe
        self._from_scratch = recipe.from_scratch(data)

    @property
    def scheduler(self) -> Any:
        """The noise schedule: 1,000 steps, squared cosine."""
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(self._from_scratch.scheduler)

    def base_hash(self) -> str:
        """A hash of the finished base: what is made from another one is another run."""
        return networks_hash(self.load_base())

    def load_base(self) -> nn.Module:
        """The finished base model."""
        return open_base(self.folder / BASE, None).model

    def base(self) -> Path:
        """The full-data model, as a diffusers pipeline folder."""
        self._make(Retraining(self.data, self._from_scratch), self.folder)
        return self.folder / BASE

    def logo(self) -> dict[str, Path]:
        """One model a group, trained from scratch on all other groups."""
        return self._make(Retraining(self.data, self._from_scratch, self.data.groups), self.folder / "logo")

    def unlearned(self) -> dict[str, Path]:
        """One model a group: the base with the group unlearned by ReTrack."""
        series = Unlearning(self.data, self.folder / BASE, self.recipe.unlearning(), self.data.groups)
        return self._make(series, self.folder / "unlearned")

    def _make(self, series: Series, out: Path) -> dict[str, Path]:
        done = sum(finished(out / name, series.settings(name)) for name in series.names)
        with Progress(series.names, done) as progress:
            complete(series, out, progress)
        return {name: out / name for name in series.names}
