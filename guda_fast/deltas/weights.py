"""The named tensors of one model, wherever they come from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

# Where training scripts put the model inside a checkpoint, in the order in which they are looked for.
CONTAINERS = ("unet_state_dict", "model_state_dict", "state_dict", "unet")
_PREFIXES = ("module.", "_orig_mod.", *(f"{container}." for container in CONTAINERS))


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor that is read when asked for, and what is known of it before.

    origin: the file (or the description of the object) it comes from
    read: gives the tensor on the CPU; it may share memory with an object that is not ours
    problem: why there is no tensor with plain values, empty if there is
    shape, dtype: of the tensor, if there is no problem
    """

    origin: str
    read: Callable[[], Any]
    problem: str = ""
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Weights:
    """The tensors of one model by name, and its configuration where the format has one.

    origin: the path or the description that an error names
    entries: the tensors by name
    config: the model configuration, or None
    config_origin: the file of the configuration
    files: all files that were read, none for an object in memory
    """

    origin: str
    entries: Mapping[str, Entry]
    config: Mapping[str, Any] | None = None
    config_origin: str = ""
    files: tuple[Path, ...] = ()

    def named_like(self, expected: Collection[str]) -> Weights:
        """The same tensors without the wrapper prefixes (``module.``, ``unet.``, ...) that ``expected`` lacks."""
        entries = dict(self.entries)
        while prefix := next((p for p in _PREFIXES if _all_start(entries, p) and not _all_start(expected, p)), ""):
            entries = {name.removeprefix(prefix): entry for name, entry in entries.items()}
        return replace(self, entries=entries)


def entry_of(value: object, origin: str) -> Entry:
    """The entry of an object in memory, whether or not it is a tensor."""
    if not isinstance(value, torch.Tensor):
        return Entry(origin, lambda: value, f"must be a tensor, found {type(value).__name__}")
    problem = ""
    if value.layout != torch.strided or value.is_meta:
        kind = "on the meta device" if value.is_meta else f"with layout {value.layout}"
        problem = f"must be a dense tensor with values, found one {kind}"
    return Entry(origin, lambda: value.detach().to("cpu"), problem, tuple(value.shape), value.dtype)


def from_module(model: torch.nn.Module, origin: str) -> Weights:
    """The parameters and buffers of a module in memory."""
    entries = {name: entry_of(tensor, origin) for name, tensor in named_tensors(model).items()}
    return Weights(origin, entries, config=module_config(model), config_origin=origin)


def module_config(model: torch.nn.Module) -> dict[str, Any] | None:
    """The configuration that a diffusers model carries; None for other modules."""
    config = getattr(model, "config", None)
    return {**config, "_class_name": type(model).__name__} if isinstance(config, Mapping) else None


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name; a shared tensor appears under each of its names."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def _all_start(names: Collection[str], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)
