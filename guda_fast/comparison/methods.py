"""Methods by name: what each needs, how it is run, and what it has to be told."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from typing import Protocol as Interface

import numpy as np
import torch
from numpy.typing import NDArray

from guda_fast._json import read_object
from guda_fast.attribution import attribute
from guda_fast.baselines import (
    Embedder,
    embed,
    gradient_attribution,
    pixel_similarity,
    query_unlearning,
    similarity,
    transformers_encoder,
    unet_features,
)
from guda_fast.baselines.gradients import METHODS
from guda_fast.baselines.gradients.groups import AGGREGATES
from guda_fast.baselines.similarity import REDUCTIONS
from guda_fast.counterfactuals.runs import RECORD
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.datasets.queries import QuerySet
from guda_fast.deltas import DeltaBank
from guda_fast.deltas.sources import Source
from guda_fast.diffusion import Protocol
from guda_fast.diffusion.conditions import Conditions
from guda_fast.results import Attribution


@dataclass(frozen=True, eq=False)
class Setting:
    """What all methods are compared on.

    base: a diffusers folder. bank: gives its model and schedule; its groups are not used.
    protocol: of scores by counterfactuals.
    data: the training images and their groups. queries: with conditions where the images have some; distinct ones count
        once. device: of the forwards [cpu].
    """

    base: Path
    bank: DeltaBank
    protocol: Protocol
    data: GroupedImages
    queries: QuerySet
    device: str = "cpu"

    @property
    def conditions(self) -> Conditions | None:
        """Of the distinct queries; None for an unconditional model."""
        return None if self.data.conditions is None else self.queries.conditions


class Found(NamedTuple):
    """An answer. scores: of the distinct queries, or a result [(U, K), float64]. forwards: of one image, where a
    backward pass counts as two. making: seconds that its models took to make, where their records say so."""

    scores: NDArray[np.float64] | Attribution
    forwards: int
    making: float | None = None


class Method(Interface):
    """One way to answer."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the answer depends on besides the setting, as JSON values."""
        ...

    def run(self, setting: Setting) -> Found:
        """The answer for all queries of a setting."""
        ...


@dataclass(frozen=True)
class Counterfactuals:
    """Models of each group that were unlearned or retrained without it, scored by the engine.

    folder: has a model a group, as ``guda-fast unlearn`` and ``logo`` make them.
    """

    folder: Path
    sources: Mapping[str, Source]
    hashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"method": "counterfactuals", "deltas": dict(self.hashes)}

    def run(self, setting: Setting) -> Found:
        models = {group: self.sources[group] for group in setting.data.groups}
        bank, queries = DeltaBank.load(setting.base, models), setting.queries
        result = attribute(
            queries.x0,
            bank,
            setting.protocol,
            conditions=setting.conditions,
            ids=queries.ids,
            device=setting.device,
            progress=True,
        )
        forwards = (len(models) + 1) * len(queries.x0) * setting.protocol.draws
        return Found(result.scores, forwards, _making_seconds(self.folder, models))


def _making_seconds(folder: Path, groups: Iterable[str]) -> float | None:
    """The seconds that the models of groups took, by the records of their runs; None where one has none."""
    total = 0.0
    for group in groups:
        record = folder / group / RECORD
        seconds = read_object(record).get("seconds") if record.is_file() else None
        if not isinstance(seconds, int | float):
            return None
        total += seconds
    return total


@dataclass(frozen=True)
class Baseline:
    """A method without counterfactuals. answer: (setting, its choices) -> Found. choices: by name, as JSON values."""

    name: str
    answer: Callable[..., Found]
    choices: Mapping[str, Any]

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"method": self.name, **self.choices}

    def run(self, setting: Setting) -> Found:
        return self.answer(setting, **self.choices)


def _pixels(setting: Setting, **choices: Any) -> Found:
    return Found(pixel_similarity(setting.queries.x0, setting.data, device=setting.device, **choices), 0)


def _unet(setting: Setting, *, timestep: int | None = None, **choices: Any) -> Found:
    embedder = unet_features(
        setting.bank.model, setting.protocol.schedule, condition=_no_condition(setting), timestep=timestep
    )
    return _embedded(setting, embedder, choices)


def _no_condition(setting: Setting) -> Mapping[str, Any] | None:
    """What a conditional model sees where nothing is said of an image."""
    data = setting.data
    if data.conditions is None:
        return None
    if data.null is None:
        raise ValueError("--method unet: data must have an empty condition, as of null=yes, got data without one")
    like = next(setting.bank.model.parameters())
    return data.conditions.to(like.device, like.dtype).take(torch.tensor([data.null], device=like.device))


def _encoder(setting: Setting, *, folder: str, **choices: Any) -> Found:
    return _embedded(setting, transformers_encoder(folder, device=setting.device), choices)


def _embedded(setting: Setting, embedder: Embedder, choices: Mapping[str, Any]) -> Found:
    images, queries = setting.data.take(torch.arange(len(setting.data))), setting.queries.x0
    features = embed(queries, embedder), embed(images, embedder)
    scores = similarity(*features, setting.data.members, device=setting.device, **choices)
    return Found(scores, len(queries) + len(images))


def _gradients(setting: Setting, method: str, **choices: Any) -> Found:
    told: list[int] = []
    scores = gradient_attribution(
        copy.deepcopy(setting.bank.model).requires_grad_(),
        setting.protocol.schedule,
        setting.data,
        setting.queries.x0,
        method=method,
        conditions=setting.conditions,
        advance=told.append,
        **choices,
    )
    return Found(scores, 3 * sum(told))


def _query_unlearning(setting: Setting, *, stride: int = 100, **choices: Any) -> Found:
    protocol = Protocol.from_scheduler(
        setting.protocol.schedule, start=stride // 2, stride=stride, weighting="simple", seed=setting.protocol.seed
    )
    told: list[int] = []
    queries = setting.queries
    scores = query_unlearning(
        setting.bank,
        protocol,
        setting.data,
        queries.x0,
        queries.ids,
        conditions=setting.conditions,
        advance=told.append,
        **choices,
    )
    return Found(scores, sum(told))


class _Spec(NamedTuple):
    """answer: what runs. fixed: choices that the name makes. kinds: of the choices that a user may make, or the texts
    that there are. opens: a choice that must be made, for it names a folder, and what reads that."""

    answer: Callable[..., Found]
    fixed: Mapping[str, Any]
    kinds: Mapping[str, type | tuple[str, ...]]
    opens: tuple[str, Callable[[str], object]] | None = None


_REDUCE: Mapping[str, type | tuple[str, ...]] = {"reduce": REDUCTIONS, "k": int}
_GRADIENTS: Mapping[str, type | tuple[str, ...]] = {
    "timesteps": int,
    "dimensions": int,
    "damping": float,
    "aggregate": AGGREGATES,
    "top_k": int,
    "batch_size": int,
    "seed": int,
}
_UNLEARNING: Mapping[str, type | tuple[str, ...]] = {
    "stride": int,
    "rise": float,
    "damping": float,
    "images_per_group": int,
    "trained": str,
    "seed": int,
}
BASELINES: Mapping[str, _Spec] = {
    "pixels": _Spec(_pixels, {}, _REDUCE),
    "unet": _Spec(_unet, {}, {**_REDUCE, "timestep": int}),
    "encoder": _Spec(_encoder, {}, {**_REDUCE, "folder": str}, ("folder", transformers_encoder)),
    **{name: _Spec(_gradients, {"method": name}, _GRADIENTS) for name in METHODS},
    "query-unlearning": _Spec(_query_unlearning, {}, _UNLEARNING),
}
"""By the names that `baseline` takes."""


def baseline(spec: str) -> Baseline:
    """A method by a line of text: its name, then ``,key=value`` for each choice.

    Raises ValueError naming what is not known, with what there is; for a folder that it needs, what opening it raises:
    a comparison should not end on that after its models were scored.
    """
    name, *given = spec.split(",")
    if name not in BASELINES:
        raise ValueError(f"--method: must be one of {', '.join(BASELINES)}, got {name!r}")
    answer, fixed, kinds, opens = BASELINES[name]
    choices = dict(fixed)
    for entry in given:
        key, separator, value = entry.partition("=")
        if not separator or key not in kinds:
            known = ", ".join(kinds)
            raise ValueError(f"--method {name}: choices must be KEY=VALUE with a key of {known}, got {entry!r}")
        choices[key] = _choice(f"--method {name}: {key}", kinds[key], value)
    if opens is not None:
        needed, read = opens
        if needed not in choices:
            raise ValueError(f"--method {name}: must have {needed}=, got none")
        read(choices[needed])
    return Baseline(name, answer, choices)


def _choice(where: str, kind: type | tuple[str, ...], value: str) -> Any:
    if isinstance(kind, tuple):
        if value not in kind:
            raise ValueError(f"{where} must be one of {', '.join(kind)}, got {value!r}")
        return value
    try:
        return kind(value)
    except ValueError as error:
        raise ValueError(f"{where} must be of type {kind.__name__}, got {value!r}") from error
