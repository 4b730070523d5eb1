"""What a user may pass as a counterfactual, recognised from its content."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from guda_fast._validate import check_choice, check_real, describe
from guda_fast.deltas.base import Base
from guda_fast.deltas.delta import Delta
from guda_fast.deltas.formats import compvis, ema, lora, partial, peft
from guda_fast.deltas.formats.diffusers import check_config, holds_model, is_shard, open_folder
from guda_fast.deltas.formats.state_dict import from_mapping, open_file, refuse_text_encoders
from guda_fast.deltas.pack import Pack
from guda_fast.deltas.pack_file import is_pack
from guda_fast.deltas.weights import Weights, existing_path, from_module, unwrapped
from guda_fast.errors import CheckpointError

Openable = str | os.PathLike[str] | Mapping[str, torch.Tensor] | torch.nn.Module
Given = Openable | Delta | Pack
Format = Literal["diffusers", "state_dict", "partial", "peft", "lora", "ema", "compvis", "pack"]
Kept = Literal["raw", "ema"]


@dataclass(frozen=True, eq=False)
class Source:
    """A counterfactual, and how to read it where its content leaves a choice.

    what: a path, a state dict, a torch.nn.Module, a Delta, a Pack of one group, or a callable that gives one of these
        when a bank is loaded
    format: its format, None to recognise it from the content
    weights: "raw", or "ema" for the moving average that a training script kept beside the weights; None for the
        weights, or for the average where there is nothing else
    scale: multiplies a LoRA's difference, on top of its own alpha / rank [-1e6 <= scale <= 1e6]
    variant: of a diffusers folder that has several, such as "fp16" or "non_ema"; None for the plain weights

    Raises: TypeError or ValueError for an argument of another type or range

    >>> Source("runs/unlearn_cat", weights="ema").weights
    'ema'
    """

    what: Given | Callable[[], Given]
    _: KW_ONLY
    format: Format | None = None
    weights: Kept | None = None
    scale: float = 1.0
    variant: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.what, _TYPES) and not callable(self.what):
            raise TypeError(f"Source: what must be {_KINDS}, got {describe(self.what)}")
        if self.format is not None:
            check_choice("Source", "format", self.format, get_args(Format))
        if self.weights is not None:
            check_choice("Source", "weights", self.weights, get_args(Kept))
        check_real("Source", "scale", self.scale, -1e6, 1e6)
        if self.variant is not None and not isinstance(self.variant, str):
            raise TypeError(f"Source: variant must be a string or None, got {describe(self.variant)}")


SourceLike = Given | Callable[[], Given] | Source
_TYPES = (str, os.PathLike, Mapping, torch.nn.Module, Delta, Pack)
_LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_BY_KEYS = ("state_dict", "partial", "lora", "ema", "compvis")
_AS_A_PART = 'pass Source(..., format="partial"), or PATH,format=partial to a command, if the rest equals the base'
_OF_A_SHARD = "this is one shard of a model, whose folder loads whole; "
_KINDS = "a path, a state dict, a torch.nn.Module, a Delta, a Pack, or a callable that gives one of these"


def check_source(source: object, name: str) -> None:
    """Check that a source is of a type that can be opened and, a path, that it exists."""
    what = source.what if isinstance(source, Source) else source
    if isinstance(what, str | os.PathLike):
        existing_path(what)
    elif not isinstance(what, _TYPES) and not callable(what):
        raise TypeError(f"DeltaBank.load: {name} must be {_KINDS}, or a Source, got {describe(source)}")


def resolved(source: SourceLike, name: str) -> tuple[Given, Source]:
    """What there is to open, a callable called and a path in full, and how it was asked to be read."""
    how = source if isinstance(source, Source) else Source(source)
    what = how.what
    if callable(what) and not isinstance(what, _TYPES):
        what = what()
    if isinstance(what, str | os.PathLike):
        # In full, so that a change of the working directory changes nothing.
        return existing_path(what).absolute(), how
    if isinstance(what, Delta) and (how.format, how.weights, how.scale, how.variant) != (None, None, 1, None):
        raise ValueError(f"DeltaBank.load: {name}: a Delta leaves no choice of format, weights, scale or variant")
    if not isinstance(what, Mapping | torch.nn.Module | Delta | Pack):
        raise TypeError(
            f"DeltaBank.load: {name} must give a path, a state dict, a torch.nn.Module, a Delta or a Pack, "
            f"got {describe(what)}"
        )
    return what, how


def opened_pack(what: Given, how: Source) -> Pack | None:
    """The pack that a source is, opened; None for any other source.

    what: as ``resolved`` gives it
    Raises: CheckpointError for a pack that cannot be read, or of which more was asked for
    """
    if isinstance(what, Path) and is_pack(what):
        what = Pack.open(what)
    if not isinstance(what, Pack):
        return None
    _check_choices(how, "pack", str(what.path))
    return what


def open_source(what: Openable, how: Source, name: str, base: Base) -> Weights:
    """Open a counterfactual, and check its configuration, if it has one, against the base's.

    what: as ``resolved`` gives it
    how: the format and the choices that were asked for
    name: what the argument is called in messages about an object in memory
    base: the model that it is a counterfactual of
    Returns: its tensors by the base's names, whose values are read when asked for
    Raises: CheckpointError for what cannot be read, or is not what was asked for
    """
    if isinstance(what, Path) and what.is_dir():
        weights, found = _open_folder(what, how, base)
    else:
        if isinstance(what, torch.nn.Module):
            weights = from_module(unwrapped(what), name)
        elif isinstance(what, Mapping):
            weights = from_mapping(what, name, average=_averaged(how))
        else:
            weights = open_file(Path(what), average=_averaged(how))
        weights, found = _recognised(weights, how, base, what)
    _check_choices(how, found, weights.origin)
    lora.refuse_injected(weights, _shapes(base).keys())
    if base.config is not None:
        check_config(base.config, type(base.model), weights)
    return weights


def _open_folder(folder: Path, how: Source, base: Base) -> tuple[Weights, Format]:
    """The model or the adapter in a folder, and its format."""
    adapters = [folder / name for name in _LORA_FILES if (folder / name).is_file()]
    there: dict[Format, str] = {}
    if peft.is_adapter(folder):
        there["peft"] = "an adapter of PEFT"
    if adapters:
        there["lora"] = adapters[0].name
    if holds_model(folder):
        there["diffusers"] = "a model"
    asked: Format | None = "diffusers" if how.format == "ema" else how.format
    if len(there) > 1 and asked not in there:
        listed = " and ".join(f"{what} (format={kind!r})" for kind, what in there.items())
        raise CheckpointError(f"{folder}: holds several, {listed}; pass Source(..., format=) of one, or its own path")
    kind: Format | None = asked if asked in there else next(iter(there), None)
    if kind == "peft":
        return peft.open_adapter(folder, _shapes(base), how.scale), "peft"
    if kind == "lora":
        return lora.converted(open_file(adapters[0]), _shapes(base), how.scale), "lora"
    weights = open_folder(folder, variant=how.variant, average=_averaged(how))
    return (ema.converted(weights, base.parameters), "ema") if ema.is_ema(weights) else (weights, "diffusers")


def _recognised(weights: Weights, how: Source, base: Base, what: Openable) -> tuple[Weights, Format]:
    """The tensors of a file or a mapping by the base's names, and their format: what was asked for, or by their keys.

    Raises: CheckpointError where they cannot be read as that format
    """
    found = how.format if how.format in _BY_KEYS else _format(weights, base, what)
    if found == "ema":
        return ema.converted(weights, base.parameters), found
    if found == "lora":
        if not lora.is_lora(weights):
            raise CheckpointError(
                f"{weights.origin}: must be of format 'lora', found no factors, but {next(iter(weights.entries))!r}"
            )
        return lora.converted(weights, _shapes(base), how.scale), found
    if found == "compvis":
        average = how.weights == "ema"
        return compvis.converted(weights, base.config, len(base.tensors), average=average), found
    named = weights.named_like(list(_shapes(base)))
    refuse_text_encoders(named, _shapes(base).keys())
    if found == "partial":
        return partial.as_partial(named), found
    if how.format is None and weights.config is None and partial.lacks_keys(named, base.tensors):
        shard = isinstance(what, Path) and is_shard(what)
        named = replace(named, advice=_OF_A_SHARD + _AS_A_PART if shard else _AS_A_PART)
    return named, found


def _format(weights: Weights, base: Base, what: Openable) -> Format:
    """What the keys say: those of each format are in no other."""
    if ema.is_ema(weights):
        return "ema"
    if compvis.is_compvis(weights):
        return "compvis"
    if lora.is_lora(weights):
        return "lora"
    # A module is whole, and a shard is not all of its model: neither was made to have some of the parameters.
    if weights.whole or not partial.is_partial(weights.named_like(list(_shapes(base))), base.tensors):
        return "state_dict"
    return "state_dict" if isinstance(what, Path) and is_shard(what) else "partial"


def _averaged(how: Source) -> bool:
    return how.weights == "ema" or how.format == "ema"


def _check_choices(how: Source, found: Format, origin: str) -> None:
    """Refuse a choice that the source does not have, which would be passed over in silence."""
    if how.format is not None and found != how.format:
        raise CheckpointError(f"{origin}: must be of format {how.format!r}, found {found!r}")
    if how.weights == "ema" and found not in ("diffusers", "ema", "compvis"):
        raise CheckpointError(f"{origin}: must have a moving average for weights='ema', found format {found!r}")
    if how.weights == "raw" and found == "ema":
        raise CheckpointError(f"{origin}: must have the weights themselves for weights='raw', found their average only")
    if how.scale != 1 and found not in ("lora", "peft"):
        raise CheckpointError(f"{origin}: must be a LoRA for scale={how.scale:g}, found format {found!r}")
    if how.variant is not None and found != "diffusers":
        raise CheckpointError(f"{origin}: must be a diffusers folder for variant={how.variant!r}, found {found!r}")


def _shapes(base: Base) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for tensor in base.tensors for name in tensor.names}
