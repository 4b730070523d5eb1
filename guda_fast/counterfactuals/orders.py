"""Orders of the command line: what to make, in plain values, from which any process opens the same series."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from guda_fast.counterfactuals.config import TrainConfig
from guda_fast.counterfactuals.networks import find_network, fitted
from guda_fast.counterfactuals.recipes import BaseRecipe, Retraining, Unlearning, UnlearningRecipe, check_trained_on
from guda_fast.datasets import GroupedImages, open_dataset, with_controls

ALL = "all"


@dataclass(frozen=True)
class BaseOrder:
    """A base. data: see ``open_dataset``. network: see ``find_network``. training: fields of ``TrainConfig``."""

    data: str
    name: str
    network: str = "digits"
    training: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    label_dropout: float = 0.0

    def open(self) -> Retraining:
        """Read the data."""
        data, network = open_dataset(self.data), find_network(self.network)
        recipe = BaseRecipe(
            fitted(network.config, data),
            dict(network.scheduler),
            configured(network.trained(**self.training)),
            network.batch_size if self.batch_size is None else self.batch_size,
            self.label_dropout,
        )
        return Retraining(data, recipe, name=self.name)


@dataclass(frozen=True)
class LogoOrder:
    """LOGO models of a base that ``BaseOrder`` made. groups: names, or ``ALL``. seed: [None for the base's]."""

    base: Path
    data: str
    groups: tuple[str, ...] = (ALL,)
    seed: int | None = None

    def open(self) -> Retraining:
        """Read data and recipe; CheckpointError where the base was trained on other data."""
        data, recipe = open_dataset(self.data), BaseRecipe.of(self.base)
        if self.seed is not None:
            recipe = replace(recipe, training=replace(recipe.training, seed=self.seed))
        series = Retraining(data, recipe, _named(data, self.groups))
        check_trained_on(self.base, series.record)
        return series


@dataclass(frozen=True)
class UnlearnOrder:
    """Unlearned models of a base. groups: names, or ``ALL``. controls: control groups beside them [>= 0]."""

    base: Path
    data: str
    recipe: UnlearningRecipe
    groups: tuple[str, ...] = (ALL,)
    controls: int = 0

    def open(self) -> Unlearning:
        """Read data and base."""
        data = open_dataset(self.data)
        groups = _named(data, self.groups)
        if self.controls:
            data = with_controls(data, self.controls)
        return Unlearning(data, self.base, _with_keys(self.recipe, data), (*groups, *data.controls))


def configured(fields: Mapping[str, Any]) -> TrainConfig:
    """Settings from values that a user typed: what has the wrong type is ValueError, as what is out of range."""
    choices = [each.name for each in dataclasses.fields(TrainConfig)]
    if unknown := [name for name in fields if name not in choices]:
        raise ValueError(f"train: settings must be among {', '.join(choices)}, got {', '.join(unknown)}")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    try:
        return TrainConfig(**given)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _with_keys(recipe: UnlearningRecipe, data: GroupedImages) -> UnlearningRecipe:
    """With a table of anchors whose keys are those of the data, where JSON has texts for labels."""
    table = recipe.options.get("anchors")
    if not isinstance(table, Mapping) or data.conditions is None or data.conditions.keys is None:
        return recipe
    keys = {str(key): key for key in data.conditions.keys}
    typed = {
        keys.get(condition, condition): {keys.get(anchor, anchor): weight for anchor, weight in anchors.items()}
        for condition, anchors in table.items()
    }
    return replace(recipe, options={**recipe.options, "anchors": typed})


def _named(data: GroupedImages, groups: tuple[str, ...]) -> tuple[str, ...]:
    return data.groups if groups == (ALL,) else groups
