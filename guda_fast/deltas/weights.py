"""The named tensors of one model, wherever they come from."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from guda_fast.deltas.delta import Part
from guda_fast.errors import CheckpointError

# Where training scripts put the model inside a checkpoint, in the order in which they are looked for.
CONTAINERS = ("unet_state_dict", "model_state_dict", "state_dict", "unet")
# More than anybody has; a file may hold names of a hundred thousand.
_MOST_WRAPPERS = 8
_PREFIXES = ("module.", "_orig_mod.", *(f"{container}." for container in CONTAINERS))


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor that is read when asked for, and what is known of it before.

    origin: the file (or the description of the object) it comes from
    read: gives the tensor on the CPU; it may share memory with an object that is not ours
    problem: why there is no tensor with plain values, empty if there is
    shape, dtype: of the tensor, if there is no problem
    repeated: whether the tensor shows the same memory several times, so that its copy is larger than what was read
    """

    origin: str
    read: Callable[[], Any]
    problem: str = ""
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Factors:
    """A difference that an adapter makes, mostly of low rank, read when asked for; and what is known of it before.

    origin: the file (or the description of the object) it comes from
    key: what the file calls it
    read: gives the difference on the CPU; it may share memory with an object that is not ours
    shape: of the parameter that it belongs to
    dtype: in which the file holds it
    """

    origin: str
    key: str
    read: Callable[[], Part]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Weights:
    """The tensors of one model by name, and its configuration where the format has one.

    origin: the path or the description that an error names
    entries: the tensors by name; their values replace the base's
    config: the model configuration, or None
    config_origin: the file of the configuration
    files: all files that were read, none for an object in memory
    factors: differences by the base's parameter names; no name is in ``entries`` too
    complete: whether what is in neither is missing; where not, it equals the base
    metadata: the text that a safetensors header holds beside the tensors
    whole: whether it is a model by where it comes from, so that missing keys are an error
    advice: what else the file may be, for the error that says that keys are missing
    """

    origin: str
    entries: Mapping[str, Entry]
    config: Mapping[str, Any] | None = None
    config_origin: str = ""
    files: tuple[Path, ...] = ()
    factors: Mapping[str, Factors] = field(default_factory=dict)
    complete: bool = True
    metadata: Mapping[str, str] = field(default_factory=dict)
    whole: bool = False
    advice: str = ""

    def named_like(self, expected: Collection[str]) -> Weights:
        """The same tensors without the wrapper prefixes (``module.``, ``unet.``, ...) that ``expected`` lacks."""
        known = frozenset(expected)
        start = len(wrapper(self.entries, _PREFIXES, known.__contains__))
        entries = {name[start:]: entry for name, entry in self.entries.items()}
        return replace(self, entries=entries)


def entry_of(value: object, origin: str) -> Entry:
    """The entry of an object in memory, whether or not it is a tensor."""
    if not isinstance(value, torch.Tensor):
        return Entry(origin, lambda: value, f"must be a tensor, found {type(value).__name__}")
    problem = ""
    if value.layout != torch.strided or value.is_meta:
        kind = "on the meta device" if value.is_meta else f"with layout {value.layout}"
        problem = f"must be a dense tensor with values, found one {kind}"
    repeated = not problem and value.numel() * value.element_size() > value.untyped_storage().nbytes()
    return Entry(origin, lambda: value.detach().to("cpu"), problem, tuple(value.shape), value.dtype, repeated)


def from_module(model: torch.nn.Module, origin: str) -> Weights:
    """The parameters and buffers of a module in memory."""
    entries = {name: entry_of(tensor, origin) for name, tensor in named_tensors(model).items()}
    return Weights(origin, entries, config=module_config(model), config_origin=origin, whole=True)


def module_config(model: torch.nn.Module) -> dict[str, Any] | None:
    """The configuration that a diffusers model carries; None for other modules."""
    config = getattr(model, "config", None)
    return {**config, "_class_name": type(model).__name__} if isinstance(config, Mapping) else None


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name; a shared tensor appears under each of its names."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


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


def wrapper(names: Collection[str], prefixes: Collection[str], fits: Callable[[str], bool]) -> str:
    """The prefixes, one after the other, that all names begin with, and without which the most of them fit.

    As few of them as that takes, so that names which fit as they are stay so; all of them where no name ever fits.
    """
    # What the first and the last in order begin with, all between them do.
    ends = min(names, default=""), max(names, default="")
    starts = [0]
    while len(starts) <= _MOST_WRAPPERS:
        following = (p for p in prefixes if all(name.startswith(p, starts[-1]) for name in ends))
        if not (prefix := next(following, "")):
            break
        starts.append(starts[-1] + len(prefix))
    if len(starts) == 1:
        return ""
    fitting = [sum(fits(name[start:]) for name in names) for start in starts]
    return ends[0][: starts[fitting.index(max(fitting))] if any(fitting) else starts[-1]]
