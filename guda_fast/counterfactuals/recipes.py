"""How each model of a series is made: a base, its LOGO models, or its unlearned ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from guda_fast._json import read_object
from guda_fast._validate import check_choice, check_int, check_real
from guda_fast.counterfactuals.checkpoint import digest
from guda_fast.counterfactuals.log import LOG
from guda_fast.counterfactuals.networks import check_fits, initial
from guda_fast.counterfactuals.objective import Batch, DenoisingObjective, Objective, Rows
from guda_fast.counterfactuals.operators import OPERATORS, Preset, make_objective
from guda_fast.counterfactuals.runs import RECORD, write_manifest
from guda_fast.counterfactuals.trainer import TrainConfig, TrainResult
from guda_fast.datasets.encoders import networks_hash
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.datasets.manifest import manifest
from guda_fast.deltas.base import open_base
from guda_fast.diffusion.schedule import Schedule
from guda_fast.errors import CheckpointError

BASE = "base"
_STEPS = 300
_TRAINING = tuple(field.name for field in fields(TrainConfig))


class Series(Protocol):
    """Runs that start from one model; what a queue works through."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the runs, and of their folders."""

    @property
    def record(self) -> Mapping[str, Any]:
        """The manifest of the data."""

    @property
    def start(self) -> nn.Module:
        """The model that every run starts from."""

    def config(self, name: str) -> TrainConfig:
        """How a run is trained."""

    def settings(self, name: str) -> dict[str, Any]:
        """All that decides what a run gives, as JSON values."""

    def objective(self, name: str) -> Objective:
        """What a run minimises."""

    def write(self, name: str, result: TrainResult, folder: Path) -> None:
        """Write the finished model into a folder."""


@dataclass(frozen=True)
class BaseRecipe:
    """How a base is trained, and with it the LOGO models.

    network: complete diffusers configuration. scheduler: diffusers configuration of the noise schedule.
    training: see ``TrainConfig``; its seed is that of the first weights too.
    batch_size: images a step [>= 1].
    label_dropout: share of images that are shown with the data's null condition in place of their own [0..1)
    """

    network: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    training: TrainConfig
    batch_size: int = 64
    label_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_int("BaseRecipe", "batch_size", self.batch_size, 1)
        check_real("BaseRecipe", "label_dropout", self.label_dropout, 0, 1)
        if self.label_dropout == 1:
            raise ValueError("BaseRecipe: label_dropout must be below 1, or no image keeps its condition, got 1")

    @classmethod
    def of(cls, base: Path) -> BaseRecipe:
        """The recipe that a base was made by, from the record in its folder; CheckpointError without one."""
        record = base / RECORD
        try:
            found = read_object(record)["settings"]
            training = {key: found[key] for key in _TRAINING if key in found}
            if isinstance(training.get("trained"), list):
                training["trained"] = tuple(training["trained"])
            own = {f.name: found[f.name] for f in fields(cls) if f.name != "training"}
            return cls(**own, training=TrainConfig(**training))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{record}: must be the record of a base that guda-fast train made, "
                f"found {type(error).__name__}: {error}"
            ) from error

    def settings(self) -> dict[str, Any]:
        """As JSON values, without nesting the training's, so that what differs is named shortly."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "training"}
        return {**own, **asdict(self.training)}


class Retraining:
    """A base, or LOGO models: the same network from the same first weights, without a group.

    data: all images. recipe: of the base. groups: to leave out, a run each [names; None for one run on all images].
    name: of that one run.

    A class-conditional LOGO model keeps its group's label, whose embedding no image trains.

    Raises TypeError or ValueError naming the group, CheckpointError where network and data do not fit.
    """

    def __init__(
        self, data: GroupedImages, recipe: BaseRecipe, groups: Sequence[str] | None = None, *, name: str = BASE
    ) -> None:
        self.data, self.recipe = data, recipe
        self.names = (name,) if groups is None else checked_groups(data, groups)
        self._without = dict.fromkeys(self.names) if groups is None else {group: group for group in self.names}
        self._schedule = Schedule.from_scheduler(recipe.scheduler)
        self.record = manifest(data)
        if recipe.label_dropout > 0 and data.null is None:
            raise ValueError("label_dropout: must come with data that have a null condition, got data without one")

    @cached_property
    def start(self) -> nn.Module:
        """The untrained network."""
        model = initial(self.recipe.network, self.recipe.training.seed)
        check_fits("network", model, self.data)
        return model

    def config(self, name: str) -> TrainConfig:
        """The recipe's."""
        return self.recipe.training

    def settings(self, name: str) -> dict[str, Any]:
        """All that decides what a run gives."""
        group = self._without[name]
        return {"run": "logo" if group else "base", **identity(self.record, group), **self.recipe.settings()}

    def objective(self, name: str) -> Objective:
        """The ordinary loss on what remains."""
        group = self._without[name]
        index = None if group is None else self.data.rest(group)
        objective = DenoisingObjective(self.data, self._schedule, index, batch_size=self.recipe.batch_size)
        if self.recipe.label_dropout == 0 or self.data.null is None:
            return objective
        return LabelDropout(objective, self.data.null, self.recipe.label_dropout)

    def write(self, name: str, result: TrainResult, folder: Path) -> None:
        """A diffusers pipeline and the data's manifest of a base, the bare model of a LOGO run; and the log."""
        if self._without[name] is not None:
            result.save(folder)
            return
        from diffusers import DDPMPipeline, DDPMScheduler

        scheduler: Any = DDPMScheduler.from_config(dict(self.recipe.scheduler))
        pipeline: Any = DDPMPipeline(result.model, scheduler)
        pipeline.save_config(folder)
        scheduler.save_pretrained(folder / "scheduler")
        result.save(folder / "unet")
        (folder / "unet" / LOG).rename(folder / LOG)
        write_manifest(folder, self.record)


class LabelDropout:
    """An objective whose conditions are now and then the null one, as classifier-free guidance needs it.

    objective: draws the rows; without a forget side. null: row of its conditions. share: of rows that change [0..1).
    """

    forget_weight = 0.0
    forget_share: float | None = None

    def __init__(self, objective: DenoisingObjective, null: int, share: float) -> None:
        self.objective, self.null, self.share = objective, null, share
        self.conditions, self.retain_weight = objective.conditions, objective.retain_weight

    def draw(self, generator: torch.Generator) -> Batch:
        """The rows of a fresh step; which of them change is drawn last."""
        rows: Rows = self.objective.draw(generator).retain
        if rows.condition is None:
            return Batch(rows)
        dropped = torch.rand(len(rows.t), generator=generator) < self.share
        return Batch(replace(rows, condition=rows.condition.masked_fill(dropped, self.null)))


@dataclass(frozen=True)
class UnlearningRecipe:
    """How groups are unlearned.

    operator: a key of ``OPERATORS``. preset: one of the operator's. steps: [>= 1; None for the preset's, or 300].
    batch_size: forget images, and again retain images, a step [>= 1; None for the preset's].
    options: of the operator, and fields of ``TrainConfig``, in place of the preset's.

    Raises ValueError naming what is unknown, with the choices; TypeError or ValueError for a field of ``TrainConfig``.

    >>> UnlearningRecipe("retrack", steps=80, options={"weight": 0.5, "lr": 1e-5}).training(images=100).lr
    1e-05
    """

    operator: str
    preset: str = "default"
    steps: int | None = None
    batch_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        operator = OPERATORS[check_choice("unlearn", "operator", self.operator, OPERATORS)]
        check_choice("unlearn", "preset", self.preset, operator.presets)
        choices = [*operator.options, *_TRAINING]
        unknown = [name for name in self.options if name not in choices]
        if unknown:
            raise ValueError(
                f"unlearn: options of {self.operator} must be among {', '.join(choices)}, got {', '.join(unknown)}"
            )
        self.training(images=1)

    @property
    def images_a_step(self) -> int:
        """The batch size, of the recipe or the preset."""
        return self._preset.batch_size if self.batch_size is None else self.batch_size

    def training(self, images: int) -> TrainConfig:
        """How a group of so many images is unlearned."""
        steps = (self._preset.steps(images) or _STEPS) if self.steps is None else self.steps
        given = {name: value for name, value in self.options.items() if name in _TRAINING}
        if isinstance(given.get("trained"), list):  # as JSON has it
            given["trained"] = tuple(given["trained"])
        return TrainConfig(**{"steps": steps, **self._preset.training, **given})

    def operator_options(self) -> dict[str, Any]:
        """The operator's options, all of them."""
        operator = OPERATORS[self.operator]
        given = {name: value for name, value in self.options.items() if name in operator.options}
        return {**operator.options, **self._preset.options, **given}

    @property
    def _preset(self) -> Preset:
        return OPERATORS[self.operator].presets[self.preset]


class Unlearning:
    """A base from which groups are unlearned, a run each.

    data: all images. base: a diffusers folder, or a model. recipe: see ``UnlearningRecipe``.
    groups: names of those to unlearn. scheduler: of a base that has none beside it.

    Raises TypeError or ValueError naming the group or the argument, CheckpointError where base and data do not fit.
    """

    def __init__(
        self,
        data: GroupedImages,
        base: str | Path | nn.Module,
        recipe: UnlearningRecipe,
        groups: Sequence[str],
        *,
        scheduler: object = None,
    ) -> None:
        self.data, self.recipe = data, recipe
        self.names = checked_groups(data, groups)
        opened = open_base(base, scheduler)
        if opened.scheduler is None:
            raise ValueError(f"unlearn: scheduler must be given, found none in or beside {opened.origin}")
        check_fits(opened.origin, opened.model, data)
        self.start = opened.model
        # Private keys are of the diffusers version that wrote it.
        self._scheduler = {key: value for key, value in opened.scheduler.items() if not key.startswith("_")}
        self._schedule = Schedule.from_scheduler(opened.scheduler)
        self.record = manifest(data)
        if not isinstance(base, nn.Module):
            check_trained_on(Path(base), self.record)

    @cached_property
    def _made_of(self) -> dict[str, Any]:
        return {"base": networks_hash(self.start), "scheduler": self._scheduler}

    def config(self, name: str) -> TrainConfig:
        """The recipe's, for a group of this size."""
        return self.recipe.training(len(self.data.group(name)))

    def settings(self, name: str) -> dict[str, Any]:
        """All that decides what a run gives."""
        found = {
            "run": "unlearned",
            "operator": self.recipe.operator,
            "options": _plain(self.recipe.operator_options()),
            "batch_size": self.recipe.images_a_step,
            **self._made_of,
            **identity(self.record, name),
            **asdict(self.config(name)),
        }
        if "anchors" in OPERATORS[self.recipe.operator].needs:
            found["anchor_groups"] = _groups_hash(self.record)
        return found

    def objective(self, name: str) -> Objective:
        """The operator's."""
        return make_objective(
            self.recipe.operator,
            self.data,
            name,
            self._schedule,
            batch_size=self.recipe.images_a_step,
            **self.recipe.operator_options(),
        )

    def write(self, name: str, result: TrainResult, folder: Path) -> None:
        """The model, or the adapter of a LoRA run, and the log."""
        result.save(folder)


def checked_groups(data: GroupedImages, groups: Sequence[str]) -> tuple[str, ...]:
    """The groups, each of which leaves images when it is left out, and can name a folder; ValueError otherwise."""
    if not groups or len(set(groups)) != len(groups):
        raise ValueError(f"groups: must be distinct names, got {', '.join(groups) or 'none'}")
    for group in groups:
        data.rest(group)
        if group.startswith(".") or group != Path(group).name or not group.isprintable():
            raise ValueError(f"groups: names must be usable as those of folders, got {group!r}")
    return tuple(groups)


def identity(record: Mapping[str, Any], group: str | None) -> dict[str, Any]:
    """What of the data decides a run, from their manifest: images, conditions, and which images its own group has.

    How other images are grouped does not, but for an operator that takes anchors from the other groups, whose settings
    say so apart. Control groups never do: a group is unlearned in the same way when they are added.
    """
    found = {"images": record["images"]["hash"], "conditions": record["conditions"]}
    return found if group is None else {**found, "group": group, "members": record["groups"][group]["hash"]}


def _groups_hash(record: Mapping[str, Any]) -> str:
    """Of names and images of all groups that are no controls."""
    groups = {name: found["hash"] for name, found in record["groups"].items() if not found.get("control")}
    return hashlib.blake2b(json.dumps(groups).encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    """An option as a JSON value, a tensor as its hash."""
    if isinstance(value, torch.Tensor):
        return digest({"": value.detach().cpu()})
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def check_trained_on(base: Path, record: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a base says of itself that it was trained on other data than those of a manifest."""
    path = base / RECORD
    if not path.is_file():
        return
    trained: Any = read_object(path).get("settings")
    if not isinstance(trained, Mapping):
        return
    wanted = identity(record, None)
    if any(key in trained and _seen(trained[key]) != _seen(wanted[key]) for key in wanted):
        raise CheckpointError(f"{path}: the base must have been trained on the data that are given, found others")


def _seen(value: Any) -> Any:
    """What training a base has seen of images or conditions: not which condition another one is without its group."""
    return {key: inner for key, inner in value.items() if key != "removed"} if isinstance(value, Mapping) else value
