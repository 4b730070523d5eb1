"""Checkpoints of unfinished runs: one safetensors file that says which run it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from guda_fast._files import atomic_write
from guda_fast._validate import describe
from guda_fast.errors import CheckpointError

CHECKPOINT = "checkpoint.safetensors"
_KEY = "guda_fast.checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on.

    tensors: by name, on the CPU. values: JSON values, such as the step.
    """

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def write_checkpoint(path: Path, checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Write or replace a checkpoint: the file holds the old one or the new one at every moment.

    settings: JSON values by which ``read_checkpoint`` knows the run.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    about = {"settings": settings, "values": checkpoint.values, "digest": digest(tensors)}
    content = safetensors.torch.save(tensors, {_KEY: json.dumps(about)})
    with atomic_write(path, "wb") as file:
        file.write(content)


def read_checkpoint(path: Path, settings: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint of a run with these settings; None where there is no file.

    Raises CheckpointError, naming the file, where it is damaged or belongs to a run with other settings.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[_KEY])
            # Copies: what is mapped would be written to in place.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        whole = about["digest"] == digest(tensors)
        values, found = dict(about["values"]), dict(about["settings"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: must be the checkpoint of a run, found a damaged file ({error}); remove it to begin anew"
        ) from error
    if not whole:
        raise CheckpointError(f"{path}: must hold what was written, found other values; remove it to begin anew")
    if found != settings:
        what = _differences(settings, found)
        raise CheckpointError(f"{path}: must be of a run with the same settings, found another ({what})")
    return Checkpoint(tensors, values)


def _differences(settings: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The settings that differ; of an identity that is a JSON object, its entries."""
    wanted, others = _flat(settings), _flat(found)
    texts = []
    for name in {**wanted, **others}:
        if wanted.get(name) != others.get(name):
            one, other = describe(wanted.get(name)), describe(others.get(name))
            # What is described shortly may differ in what was left out.
            texts.append(f"{name}: wanted {one}, found {other}" if one != other else f"{name}: {one}, and another")
    return "; ".join(texts)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(inner := _parsed(value), Mapping):
            found |= {f"{name}.{key}": each for key, each in _flat(inner).items()}
        else:
            found[name] = value
    return found


def _parsed(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash over names, shapes, types and bytes [tensors on the CPU]."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def model_digest(model: nn.Module) -> str:
    """A hash of a model's weights and buffers."""
    return digest({name: value.detach().cpu() for name, value in model.state_dict().items()})
