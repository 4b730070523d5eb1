"""LoRA files that diffusers and kohya's scripts write, and that their users pass on."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping

from guda_fast.deltas.formats._lora_factors import has_factors, low_rank
from guda_fast.deltas.formats._lora_settings import Settings, read_settings
from guda_fast.deltas.weights import Weights
from guda_fast.errors import CheckpointError

_CONFIG = "lora_adapter_metadata"
_COMPONENTS = ("unet.", "transformer.")
# PEFT's layers hold the layer that they adapt, and factors under the adapter's name.
_INJECTED = re.compile(r"\.base_layer\.|\.lora_(?:embedding_)?[AB]\.(?!weight$|bias$)")


def is_lora(weights: Weights) -> bool:
    """Whether the keys are those of a LoRA, or of something akin that `converted` refuses by name."""
    return has_factors(weights.entries)


def refuse_injected(weights: Weights, known: Collection[str]) -> None:
    """Raise CheckpointError for a model with adapters inside, of which its tensors do not say all.

    known: the base's names
    """
    for key in weights.entries:
        if key not in known and _INJECTED.search(key):
            raise CheckpointError(
                f"{weights.origin}: key {key!r} is that of a model with an adapter of PEFT inside, whose scale its "
                "tensors do not say; save the adapter alone (save_pretrained, or save_lora_adapter of diffusers), or "
                "the model after merge_and_unload() (fuse_lora() and unload_lora_weights() of diffusers)"
            )


def converted(weights: Weights, names: Mapping[str, tuple[int, ...]], scale: float = 1.0) -> Weights:
    """The low-rank differences that a LoRA file makes, by the base's names.

    delta = scale s up down,   s = alpha / r of the module; 1 without an alpha; where diffusers wrote PEFT's
    configuration into the header, s = alpha / r or alpha / sqrt(r) of that

    Reads diffusers' keys (``to_q.lora_A.weight``, ``to_q.lora.down.weight``, under ``unet.`` or ``transformer.`` or
    bare), those before 0.22 (``processor.to_q_lora.down.weight``) and kohya's (``lora_unet_..._to_q.lora_down.weight``,
    also with SDXL's original names). No factor is read before it is asked for.

    weights: the opened file or state dict
    names: the base's parameters with their shapes
    scale: by which the whole difference is multiplied [any finite value; stated in ``origin`` when not 1]

    Raises: CheckpointError where a key is a text encoder's or of another kind of adapter, is unknown, or does not fit
    Source: Hu et al. 2021 (LoRA), section 4.1
    """
    return low_rank(weights, names, _settings(weights), scale)


def _settings(weights: Weights) -> Settings | None:
    """What the header says of rank and alpha; None without."""
    text = weights.metadata.get(_CONFIG)
    if text is None:
        return None
    origin = f"{weights.origin}: {_CONFIG}"
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{origin}: must hold a JSON object, found {type(config).__name__}")
    # A pipeline's file has one configuration a component, told apart by the prefix that its tensors have too.
    for prefix in _COMPONENTS:
        own = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
        if own:
            return read_settings(own, origin, prefix)
    return read_settings(config, origin)
