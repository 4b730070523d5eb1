"""The named tensors of one model, wherever they come from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

# Where training scripts put the model inside a checkpoint, in the order in which they are looked for.
CONTAINERS = ("unet_state_dict", "model_state_dict", "state_dict", "unet")
_PREFIXES = ("module.", "_orig_mod.", *(f"{container}." for container in CONTAINERS))


@dataclass(frozen=True)
class Entry:
    """One tensor that is read when asked for.

    origin: the file (or the description of the object) it comes from
    read: gives the tensor; it may be a view of a mapped file
    """

    origin: str
    read: Callable[[], Any]


@dataclass(frozen=True)
class Weights:
    """The tensors of one model by name, and its configuration where the format has one.

    origin: the path or the description that an error names
    entries: the tensors by name
    config: the model configuration, or None
    config_origin: the file of the configuration
    """

    origin: str
    entries: Mapping[str, Entry]
    config: Mapping[str, Any] | None = None
    config_origin: str = ""

    def named_like(self, expected: Collection[str]) -> Weights:
        """The same tensors without the wrapper prefixes (``module.``, ``unet.``, ...) that ``expected`` lacks."""
        entries = dict(self.entries)
        while prefix := next((p for p in _PREFIXES if _all_start(entries, p) and not _all_start(expected, p)), ""):
            entries = {name.removeprefix(prefix): entry for name, entry in entries.items()}
        return replace(self, entries=entries)


def from_module(model: torch.nn.Module, origin: str) -> Weights:
    """The parameters and buffers of a module in memory."""
    entries = {name: Entry(origin, tensor.detach) for name, tensor in named_tensors(model).items()}
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
