"""What a user may pass as a counterfactual, recognised from its content."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from guda_fast._validate import describe
from guda_fast.deltas.delta import Delta
from guda_fast.deltas.formats.diffusers import open_folder
from guda_fast.deltas.formats.state_dict import from_mapping, open_file
from guda_fast.deltas.weights import Weights, from_module
from guda_fast.errors import CheckpointError

Openable = str | os.PathLike[str] | Mapping[str, torch.Tensor] | torch.nn.Module
Source = Openable | Delta


def check_source(source: object, name: str) -> None:
    """Check that a source is of a type that can be opened and, a path, that it exists."""
    if isinstance(source, str | os.PathLike):
        existing_path(source)
    elif not isinstance(source, Mapping | torch.nn.Module | Delta):
        raise TypeError(
            f"DeltaBank.load: {name} must be a path, a state dict, a torch.nn.Module or a Delta, got {describe(source)}"
        )


def open_source(source: Openable, name: str) -> Weights:
    """Open a counterfactual: a diffusers folder, a state dict file, a state dict or a module.

    name: what the argument is called in messages about an object in memory
    Returns: its tensors, whose values are read when asked for
    Raises: CheckpointError for what cannot be read
    """
    if isinstance(source, torch.nn.Module):
        return from_module(unwrapped(source), name)
    if isinstance(source, Mapping):
        return from_mapping(source, name)
    path = existing_path(source)
    return open_folder(path) if path.is_dir() else open_file(path)


def existing_path(source: str | os.PathLike[str]) -> Path:
    """The path, which must exist: nothing is ever downloaded."""
    path = Path(source)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; models are never downloaded here: pass the local folder that "
            "save_pretrained or huggingface_hub.snapshot_download wrote"
        )
    return path


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside torch.compile's and data parallelism's wrappers."""
    while True:
        if isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            inner = model.module
        else:
            inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, torch.nn.Module):
            return model
        model = inner
