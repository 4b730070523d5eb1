"""Moving averages of a model's parameters: what diffusers' ``EMAModel.state_dict`` holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from guda_fast.deltas.formats.state_dict import SHADOWS
from guda_fast.deltas.weights import Weights
from guda_fast.errors import CheckpointError


def is_ema(weights: Weights) -> bool:
    """Whether the tensors are the shadow parameters of an ``EMAModel``."""
    return bool(weights.entries) and all(name.startswith(SHADOWS) for name in weights.entries)


def converted(weights: Weights, parameters: Sequence[str]) -> Weights:
    """Shadow parameters under the base's names: the file has them as a list, in the order of ``model.parameters()``.

    Buffers have no average, and stay the base's.

    weights: as the file has them
    parameters: the names of the base's parameters in their order, shared ones once
    Raises: CheckpointError where there are none, or not one for each parameter
    """
    if not is_ema(weights):
        raise CheckpointError(
            f"{weights.origin}: must hold 'shadow_params', as EMAModel.state_dict() gives them, found "
            f"{next(iter(weights.entries), 'nothing')!r}"
        )
    if len(weights.entries) != len(parameters):
        raise CheckpointError(
            f"{weights.origin}: key 'shadow_params' must have one tensor for each of the base's {len(parameters)} "
            f"parameters, found {len(weights.entries)}"
        )
    # A safetensors header has its names in the order of their letters: 0, 1, 10, 11, 2.
    shadows = [weights.entries.get(f"{SHADOWS}{position}") for position in range(len(parameters))]
    if None in shadows:
        raise CheckpointError(
            f"{weights.origin}: key '{SHADOWS}{shadows.index(None)}' is missing, of {len(parameters)} that are "
            "numbered from 0 on"
        )
    entries = {name: shadow for name, shadow in zip(parameters, shadows, strict=True) if shadow is not None}
    return replace(weights, entries=entries, complete=False)
