"""The keys of a LoRA file, and the differences that its factors make."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import replace
from functools import partial

import torch

from guda_fast.deltas.delta import Dense, LowRank, cast
from guda_fast.deltas.diff import FLOATING, INTEGER, KeyProblem, check_finite, wide
from guda_fast.deltas.formats._lora_modules import KOHYA_PREFIX, Modules, without_wrappers
from guda_fast.deltas.formats._lora_settings import Settings
from guda_fast.deltas.formats.state_dict import refuse_text_encoders
from guda_fast.deltas.weights import Entry, Factors, Weights
from guda_fast.errors import CheckpointError

_STEMS = {
    "down": (".lora_A", ".lora.down", "_lora.down", ".lora_linear_layer.down", ".lora_down"),
    "up": (".lora_B", ".lora.up", "_lora.up", ".lora_linear_layer.up", ".lora_up"),
}
# What a key holds, by how it ends; the first that fits counts.
_SUFFIXES = {
    **{f"{stem}.weight": role for role, stems in _STEMS.items() for stem in stems},
    **{f"{stem}.bias": "bias" for stem in _STEMS["up"]},
    ".lora_embedding_A": "down",
    ".lora_embedding_B": "up",
    ".alpha": "alpha",
}
_OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".oft_": "OFT",
    ".lora_mid.": "a LoRA with a third factor",
}


def has_factors(keys: Mapping[str, object]) -> bool:
    """Whether any key is that of a LoRA's factor, or of something akin."""
    suffixes = tuple(suffix for suffix, role in _SUFFIXES.items() if role != "alpha")
    return any(key.endswith(suffixes) or _other_kind(key) for key in keys)


def low_rank(
    weights: Weights, names: Mapping[str, tuple[int, ...]], settings: Settings | None, scale: float
) -> Weights:
    """The differences that an adapter makes, by the base's names; parameters that it holds whole become entries.

    delta = scale s B A, where s is what ``settings`` says, or, without, alpha / r with the file's own alpha of the
    module, or 1; a bias of B adds scale s times itself to the module's bias

    names: the base's parameters with their shapes
    Raises: CheckpointError naming the key that is no plain LoRA's, or does not fit the base
    """
    modules = Modules(names)
    found: dict[str, _Factored] = {}
    entries: dict[str, Entry] = {}
    shorter_keys = without_wrappers(weights.entries.keys(), lambda key: _fits(key, modules, names))
    # All of them first, because what a file is says more than that one of its keys is unknown.
    _check_kind(weights)
    refuse_text_encoders(
        replace(weights, entries={shorter_keys[key]: weights.entries[key] for key in shorter_keys}), names
    )
    for key, shorter in shorter_keys.items():
        entry = weights.entries[key]
        if suffix := _suffix(shorter):
            module = _module(modules, shorter.removesuffix(suffix), entry.origin, key)
            stated = key.removesuffix(suffix)
            found.setdefault(module, _Factored(module, stated)).put(_SUFFIXES[suffix], key, entry)
        elif ".original_module." not in shorter:
            _put_whole(entries, shorter, key, entry, names)
    if scale != 1 and entries:
        raise CheckpointError(
            f"{weights.origin}: the scale must be 1 where an adapter holds parameters whole, such as "
            f"{next(iter(entries))!r}, found {scale:g}"
        )
    factors: dict[str, Factors] = {}
    for module, factored in found.items():
        made = factored.factors(modules.shapes[module], settings, scale)
        factors[f"{module}.weight"] = made
        if "bias" in factored.given:
            factors[f"{module}.bias"] = factored.bias(names, settings, scale)
    stated = weights.origin if scale == 1 else f"{weights.origin} (scale {scale:g})"
    return replace(weights, origin=stated, entries=entries, factors=factors, complete=False)


def _suffix(key: str) -> str:
    return next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), "")


def _fits(key: str, modules: Modules, names: Container[str]) -> bool:
    suffix = _suffix(key)
    return bool(modules.candidates(key.removesuffix(suffix))) if suffix else _whole_name(key) in names


def _whole_name(key: str) -> str:
    """The name of a parameter that an adapter holds whole: of PEFT's ``modules_to_save``, or a trained bias."""
    return key.replace(".modules_to_save.", ".").replace(".base_layer.bias", ".bias")


def _other_kind(key: str) -> str:
    return next((kind for mark, kind in _OTHER_KINDS.items() if mark in key), "")


def _check_kind(weights: Weights) -> None:
    for key, entry in weights.entries.items():
        if kind := _other_kind(key):
            raise _refused(entry, key, f"must belong to a LoRA of two factors, found {kind}")


def _module(modules: Modules, module: str, origin: str, key: str) -> str:
    found = sorted(modules.candidates(module))
    if not found:
        shown = module.removeprefix(KOHYA_PREFIX)
        raise CheckpointError(f"{origin}: key {key!r} is not in the base: it has no module {shown!r} with a weight")
    if len(found) > 1:
        raise CheckpointError(
            f"{origin}: key {key!r} must belong to one module, found {' and '.join(found)} in the base"
        )
    return found[0]


def _put_whole(
    entries: dict[str, Entry], shorter: str, key: str, entry: Entry, names: Mapping[str, tuple[int, ...]]
) -> None:
    name = _whole_name(shorter)
    if name not in names:
        raise CheckpointError(f"{entry.origin}: key {key!r} is not in the base, and no LoRA's factor")
    # Where biases are trained too, PEFT writes those of modules_to_save twice, under two keys.
    entries[name] = entry


class _Factored:
    """What a file holds of one module: by role, the key and its entry.

    module: its name in the base
    stated: its name in the file, by which settings have it
    """

    def __init__(self, module: str, stated: str) -> None:
        self._module = module
        self._stated = stated
        self.given: dict[str, tuple[str, Entry]] = {}

    def put(self, role: str, key: str, entry: Entry) -> None:
        if role in self.given:
            raise _refused(entry, key, f"must be the only one for {self._module!r}, found {self.given[role][0]!r} too")
        # diffusers writes alpha as an integer.
        allowed = FLOATING + INTEGER if role == "alpha" else FLOATING
        if entry.problem or entry.dtype not in allowed:
            raise _refused(entry, key, entry.problem or f"must hold floating values, found {entry.dtype}")
        if entry.repeated:
            # Of other tensors the base's shape bounds what a small file may ask for; of a rank nothing does.
            raise _refused(entry, key, f"must have memory for each of its values, found a view of shape {entry.shape}")
        self.given[role] = (key, entry)

    def factors(self, shape: tuple[int, ...], settings: Settings | None, scale: float) -> Factors:
        """The difference of the module's weight, whose shape is given."""
        for role in ("down", "up"):
            if role not in self.given:
                key, entry = next(iter(self.given.values()))
                raise _refused(entry, key, f"must come with the {role} factor of {self._module!r}, found none")
        (down_key, down), (up_key, up) = self.given["down"], self.given["up"]
        # PEFT's factors of an embedding are those of a linear layer whose weight is the transposed one.
        transposed = ".lora_embedding_" in down_key or (
            settings is not None and settings.transposed and len(shape) == 2
        )
        _check_shapes(down_key, down, up_key, up, shape[::-1] if transposed else shape)
        total = scale * self._scale(settings, down.shape[0])
        read = partial(_read, down_key, down, up_key, up, total, transposed=transposed)
        return Factors(down.origin, down_key, read, shape, wide(down.dtype, up.dtype))

    def bias(self, names: Mapping[str, tuple[int, ...]], settings: Settings | None, scale: float) -> Factors:
        """The difference of the module's bias, which the up factor's own bias makes."""
        key, entry = self.given["bias"]
        shape = names.get(f"{self._module}.bias")
        if shape is None:
            raise _refused(entry, key, f"must belong to a module with a bias, found {self._module!r} without")
        if entry.shape != shape:
            raise _refused(entry, key, f"must have shape {shape} as in the base, found {entry.shape}")
        total = scale * self._scale(settings, self.given["down"][1].shape[0])
        return Factors(entry.origin, key, partial(_read_bias, key, entry, total), shape, wide(entry.dtype))

    def _scale(self, settings: Settings | None, rank: int) -> float:
        if settings is not None:
            key, entry = self.given["down"]
            if settings.rank_of(self._stated) != rank:
                wanted = f"must have rank {settings.rank_of(self._stated)} as in {settings.origin}, found {rank}"
                raise _refused(entry, key, wanted)
        if "alpha" not in self.given:
            return 1.0 if settings is None else settings.scale_of(self._stated)
        key, entry = self.given["alpha"]
        if settings is not None:
            raise _refused(entry, key, f"must be absent, because {settings.origin} says the scale too")
        alpha = float(entry.read()) if math.prod(entry.shape) == 1 else math.nan
        if not math.isfinite(alpha):
            raise _refused(entry, key, f"must be one finite value, found {alpha} of shape {entry.shape}")
        return alpha / rank


def _check_shapes(down_key: str, down: Entry, up_key: str, up: Entry, shape: tuple[int, ...]) -> None:
    """Check factors (r, *I) and (O, r) against a weight's shape (O, *I)."""
    if len(shape) < 2:
        raise _refused(down, down_key, f"must belong to a weight of two dimensions or more, found shape {shape}")
    if not down.shape or down.shape[0] < 1 or down.shape[1:] != shape[1:]:
        inner = ", ".join(map(str, shape[1:]))
        grouped = len(shape) > 2 and down.shape[2:] == shape[2:] and up.shape[1:2] and down.shape[1] > shape[1]
        why = ""
        if grouped and down.shape[1] * up.shape[1] == down.shape[0] * shape[1]:
            why = ": the LoRA of a grouped convolution mixes the groups, and is no difference of its weight"
        wanted = f"must have shape (r, {inner}) for the base's {shape}, found {down.shape}{why}"
        raise _refused(down, down_key, wanted)
    wanted_up = (shape[0], down.shape[0], *(1 for _ in shape[2:]))
    if up.shape != wanted_up:
        wanted = f"must have shape {wanted_up} for the base's {shape} and rank {down.shape[0]} of {down_key!r}"
        raise _refused(up, up_key, f"{wanted}, found {up.shape}")


def _read(down_key: str, down: Entry, up_key: str, up: Entry, scale: float, *, transposed: bool) -> LowRank:
    dtype = wide(down.dtype, up.dtype)
    inner = _finite(down_key, down, dtype)
    outer = _finite(up_key, up, dtype).flatten(1) * scale
    return LowRank(inner.t(), outer.t()) if transposed else LowRank(outer, inner)


def _read_bias(key: str, entry: Entry, scale: float) -> Dense:
    return Dense(_finite(key, entry, wide(entry.dtype)) * scale)


def _finite(key: str, entry: Entry, dtype: torch.dtype) -> torch.Tensor:
    found: torch.Tensor = entry.read()
    try:
        check_finite(found)
    except KeyProblem as problem:
        raise _refused(entry, key, str(problem)) from None
    return cast(found, dtype)


def _refused(entry: Entry, key: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{entry.origin}: key {key!r} {problem}")
