"""The frozen networks round a latent model: found in a pipeline's folder, loaded from there only, and hashed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Of a configuration, what says where a network comes from and how it was saved, as do names that begin with "_".
_RECORDS = ("architectures", "dtype", "torch_dtype", "transformers_version")


def component(where: str, folder: str | os.PathLike[str], name: str) -> Path:
    """The folder of a pipeline's part: ``folder/name``, or ``folder`` itself if that is the part.

    Raises FileNotFoundError where neither holds a configuration.
    """
    for path in (Path(folder) / name, Path(folder)):
        if (path / "config.json").is_file():
            return path
    raise FileNotFoundError(
        f"{where}: {folder} must be a pipeline saved by diffusers, or its {name}, found no config.json in it or in "
        f"{name}/"
    )


def frozen(model: nn.Module, device: torch.device | str | None) -> nn.Module:
    """The model in float32 for inference, on a device [CUDA where there is one]."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Not the model's own `to`, which in diffusers has something to say about dtypes.
    return nn.Module.to(model.eval().requires_grad_(False), device=device, dtype=torch.float32)


def networks_hash(*models: nn.Module) -> str:
    """A hash over what networks compute: their classes, configurations, and the names and values of all tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for model in models:
        digest.update(f"{type(model).__name__} {_settings(model)} ".encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _settings(model: nn.Module) -> str:
    config: Any = getattr(model, "config", {})
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kept = {name: value for name, value in values.items() if not name.startswith("_") and name not in _RECORDS}
    return json.dumps(kept, sort_keys=True, default=str)
