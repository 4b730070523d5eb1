"""Adapter folders as PEFT's ``save_pretrained`` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from guda_fast.deltas.formats._lora_factors import low_rank
from guda_fast.deltas.formats._lora_settings import read_settings
from guda_fast.deltas.formats.diffusers import read_json
from guda_fast.deltas.formats.state_dict import open_file
from guda_fast.deltas.weights import Weights
from guda_fast.errors import CheckpointError

_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."  # PEFT's own; what follows in a key is the module's name in the model that it adapted
_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def is_adapter(folder: Path) -> bool:
    """Whether PEFT wrote this folder."""
    return (folder / _CONFIG).is_file()


def open_adapter(folder: Path, names: Mapping[str, tuple[int, ...]], scale: float = 1.0) -> Weights:
    """The low-rank differences that a PEFT adapter makes, by the base's names.

    delta = scale s B A,   s = alpha / r of the module's patterns, or alpha / sqrt(r) with ``use_rslora``

    For linear layers, convolutions and embeddings. Parameters of ``modules_to_save`` and trained biases replace the
    base's; a bias of B (``lora_bias``) adds scale s times itself to its module's. No factor is read before it is asked
    for.

    folder: holds ``adapter_config.json`` and the weights
    names: the base's parameters with their shapes
    scale: by which the whole difference is multiplied [any finite value; 1 where the adapter holds whole parameters;
        stated in ``origin`` when not 1]

    Raises: CheckpointError where the adapter is of another kind than LoRA, or does not fit the base
    Source: Hu et al. 2021 (LoRA), section 4.1; peft.LoraConfig
    """
    config = folder / _CONFIG
    # Before the keys, because the kind of an adapter says more than that they are unknown.
    settings = read_settings(read_json(config), str(config), _PREFIX)
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder}: no weights: no {' or '.join(_FILES)}")
    opened = low_rank(open_file(path), names, settings, scale)
    return replace(opened, files=(*opened.files, config))
