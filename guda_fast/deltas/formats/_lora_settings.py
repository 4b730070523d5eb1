"""What a LoRA's configuration says of its factors: ranks and scales by module, and what cannot be read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from guda_fast.errors import CheckpointError

# Fields of peft.LoraConfig that are read here, and those that say how an adapter was made, or which modules it has.
_KNOWN = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "use_dora",
    "init_lora_weights", "bias", "lora_bias", "lora_dropout", "modules_to_save", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "auto_mapping", "base_model_name_or_path", "task_type", "inference_mode",
    "revision", "peft_version", "runtime_config", "megatron_core", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
}  # fmt: skip
# The other initialisations also change the base, so that the factors are no difference from the base given here.
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
_LARGEST = 1e30  # of a number in a configuration, far below what float32 can hold
_Patterns = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(frozen=True)
class Settings:
    """How the factors A and B of a module make its difference s B A.

    s = alpha / r, or alpha / sqrt(r) where it is rank-stabilised

    origin: the file that an error names
    rank, alpha: of modules that no pattern names [rank >= 1]
    ranks, alphas: patterns of module names, of which the first that fits counts
    stabilised: ``use_rslora``
    prefix: what a file's names have before those that the patterns were written for
    transposed: the weights of linear layers are (in, out)
    Source: Hu et al. 2021 (LoRA), section 4.1; Kalajdzievski 2023 (rsLoRA), equation 4; peft.LoraConfig
    """

    origin: str
    rank: int
    alpha: float
    ranks: _Patterns = ()
    alphas: _Patterns = ()
    stabilised: bool = False
    transposed: bool = False
    prefix: str = ""

    def rank_of(self, module: str) -> int:
        """The rank of a module's factors, the module by its name in the file."""
        return int(_matching(self.ranks, module.removeprefix(self.prefix), self.rank))

    def scale_of(self, module: str) -> float:
        """The factor s of a module's difference, the module by its name in the file."""
        rank, alpha = self.rank_of(module), _matching(self.alphas, module.removeprefix(self.prefix), self.alpha)
        return alpha / (math.sqrt(rank) if self.stabilised else rank)


def read_settings(config: Mapping[str, Any], origin: str, prefix: str = "") -> Settings:
    """The settings in a ``peft.LoraConfig`` that was written as JSON.

    prefix: what the file's names have before those that patterns were written for
    Raises: CheckpointError where the adapter is not a plain LoRA, or a field is not what it must be
    """
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"{origin}: key 'peft_type' must be 'LORA', found {kind!r}")
    if config.get("use_dora"):
        raise CheckpointError(f"{origin}: key 'use_dora' must be false, because DoRA is not supported, found true")
    initialisation = config.get("init_lora_weights")
    if initialisation not in _INITIALISATIONS:
        raise CheckpointError(
            f"{origin}: key 'init_lora_weights' must be one that leaves the base as it is, found {initialisation!r}; "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) writes a plain LoRA"
        )
    for key, value in config.items():
        if value and key not in _KNOWN:
            raise CheckpointError(
                f"{origin}: key {key!r} must be absent or off, because this variant of LoRA is not supported, "
                f"found {_shown(value)}"
            )
    return Settings(
        origin,
        int(_number(config.get("r"), "r", origin, whole=True)),
        _number(config.get("lora_alpha"), "lora_alpha", origin),
        _patterns(config.get("rank_pattern"), "rank_pattern", origin, whole=True),
        _patterns(config.get("alpha_pattern"), "alpha_pattern", origin),
        stabilised=bool(config.get("use_rslora")),
        transposed=bool(config.get("fan_in_fan_out")),
        prefix=prefix,
    )


def _matching(patterns: _Patterns, module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _patterns(found: object, key: str, origin: str, *, whole: bool = False) -> _Patterns:
    if found is not None and not isinstance(found, Mapping):
        raise CheckpointError(f"{origin}: key {key!r} must be an object, found {_shown(found)}")
    items = (found or {}).items()
    return tuple((_pattern(text, key, origin), _number(value, key, origin, whole=whole)) for text, value in items)


def _pattern(text: str, key: str, origin: str) -> re.Pattern[str]:
    """The expression that PEFT makes of a pattern, if matching it cannot take for ever."""
    if len(re.findall(r"[*+?{]", text)) > 3 or re.search(r"\)[*+{]", text):
        raise CheckpointError(
            f"{origin}: key {key!r} must have patterns with three repetitions at most, and none of a group, "
            f"found {_shown(text)}"
        )
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{origin}: key {key!r} must have regular expressions, found {_shown(text)}: {error}"
        ) from error


def _number(value: object, key: str, origin: str, *, whole: bool = False) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST:
        if not whole:
            return float(value)
        if value >= 1 and value == int(value):
            return int(value)
    wanted = "a whole number from 1 on" if whole else "a finite number"
    raise CheckpointError(f"{origin}: key {key!r} must be {wanted}, found {_shown(value)}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
