"""The base of a delta bank: a model that can run, its configuration and its scheduler's."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from guda_fast._validate import describe
from guda_fast.deltas.diff import BaseTensor, finite_values, fitting, wide
from guda_fast.deltas.formats.diffusers import (
    build_model,
    complete_config,
    find_scheduler,
    model_folder,
    open_folder,
    read_json,
)
from guda_fast.deltas.resident import base_tensors
from guda_fast.deltas.weights import Weights, existing_path, module_config, named_tensors, unwrapped
from guda_fast.errors import CheckpointError


@dataclass(frozen=True)
class Base:
    """The full-data model.

    model: a model that nobody else holds
    config: its complete configuration, None for a module without one
    scheduler: the noise scheduler's configuration, None when there is none
    origin: the path, or "base" for a model in memory
    tensors: what there is of parameters and buffers
    parameters: the first names of the parameters, in the order of ``model.parameters()``
    """

    model: torch.nn.Module
    config: dict[str, Any] | None
    scheduler: dict[str, Any] | None
    origin: str
    tensors: tuple[BaseTensor, ...] = field(init=False)
    parameters: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        # Here and not when asked for: a cast of the model may separate what shares memory.
        object.__setattr__(self, "tensors", tuple(base_tensors(self.model)))
        object.__setattr__(self, "parameters", tuple(name for name, _ in self.model.named_parameters()))


def open_base(base: object, scheduler: object) -> Base:
    """Load the base from a diffusers folder, or copy a module in memory.

    scheduler: a configuration, a scheduler object or a path; None looks into the folder
    """
    given = _scheduler_config(scheduler)
    if isinstance(base, torch.nn.Module):
        model = copy.deepcopy(unwrapped(base))
        model.zero_grad(set_to_none=True)
        config = module_config(model)
        complete = None if config is None else complete_config(type(model), config)
        return Base(model, complete, given, "base")
    if not isinstance(base, str | os.PathLike):
        raise TypeError(
            f"DeltaBank.load: base must be the path of a diffusers folder or a torch.nn.Module, got {describe(base)}"
        )
    path = existing_path(base)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: the base must be a diffusers folder, because a file has no architecture; "
            "or pass a torch.nn.Module with these weights"
        )
    folder = model_folder(path)
    weights = open_folder(folder)
    config = dict(weights.config or {})
    model = _load_model(config, weights)
    return Base(model, complete_config(type(model), config), given or find_scheduler(folder), str(path))


def _load_model(config: Mapping[str, Any], weights: Weights) -> torch.nn.Module:
    """Build the model and fill it, in float32 or in what the file has if that is wider."""
    model = build_model(config, weights.config_origin)
    tensors = base_tensors(model)
    weights = fitting(tensors, weights)
    stored = {entry.dtype for entry in weights.entries.values()}
    torch.nn.Module.to(model, dtype=wide(*(dtype for dtype in stored if dtype.is_floating_point)))
    targets = named_tensors(model)
    with torch.no_grad():
        for tensor, value in finite_values(tensors, weights):
            for name in tensor.names:
                targets[name].copy_(value)
    return model


def _scheduler_config(scheduler: object) -> dict[str, Any] | None:
    if scheduler is None:
        return None
    if isinstance(scheduler, str | os.PathLike):
        path = existing_path(scheduler)
        return read_json(path / "scheduler_config.json" if path.is_dir() else Path(path))
    if isinstance(scheduler, Mapping):
        return dict(scheduler)
    config = getattr(scheduler, "config", None)
    if isinstance(config, Mapping):
        return {**config, "_class_name": type(scheduler).__name__}
    raise TypeError(
        f"DeltaBank.load: scheduler must be a configuration, a diffusers scheduler or a path, got {describe(scheduler)}"
    )
