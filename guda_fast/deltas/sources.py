"""What a user may pass as a counterfactual, recognised from its content."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

import torch

from guda_fast._validate import check_choice, check_real, describe
from guda_fast.deltas.base import Base
from guda_fast.deltas.delta import Delta
from guda_fast.deltas.formats.diffusers import check_config, open_folder
from guda_fast.deltas.formats.state_dict import from_mapping, open_file
from guda_fast.deltas.weights import Weights, existing_path, from_module, unwrapped

Openable = str | os.PathLike[str] | Mapping[str, torch.Tensor] | torch.nn.Module
Format = Literal["diffusers", "state_dict", "partial", "peft", "lora", "ema", "compvis"]
FORMATS = ("diffusers", "state_dict", "partial", "peft", "lora", "ema", "compvis")
WEIGHTS = ("raw", "ema")


@dataclass(frozen=True, eq=False)
class Source:
    """A counterfactual, and how to read it where its content leaves a choice.

    what: a path, a state dict, a torch.nn.Module, a Delta, or a callable that gives one of these when a bank is loaded
    format: its format, None to recognise it from the content
    weights: "raw", or "ema" for the moving average that a training script kept beside the weights
    scale: multiplies a LoRA file's difference, on top of the file's own alpha / rank [-1e6 <= scale <= 1e6]
    variant: of a diffusers folder that has several, such as "fp16" or "non_ema"; None for the plain weights

    Raises: TypeError or ValueError for an argument of another type or range

    >>> Source("runs/unlearn_cat", weights="ema").weights
    'ema'
    """

    what: Openable | Delta | Callable[[], Openable | Delta]
    _: KW_ONLY
    format: Format | None = None
    weights: Literal["raw", "ema"] = "raw"
    scale: float = 1.0
    variant: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.what, str | os.PathLike | Mapping | torch.nn.Module | Delta) and not callable(self.what):
            raise TypeError(f"Source: what must be {_KINDS}, got {describe(self.what)}")
        if self.format is not None:
            check_choice("Source", "format", self.format, FORMATS)
        check_choice("Source", "weights", self.weights, WEIGHTS)
        check_real("Source", "scale", self.scale, -1e6, 1e6)
        if self.variant is not None and not isinstance(self.variant, str):
            raise TypeError(f"Source: variant must be a string or None, got {describe(self.variant)}")


SourceLike = Openable | Delta | Callable[[], Openable | Delta] | Source
_KINDS = "a path, a state dict, a torch.nn.Module, a Delta, or a callable that gives one of these"


def check_source(source: object, name: str) -> None:
    """Check that a source is of a type that can be opened and, a path, that it exists."""
    what = source.what if isinstance(source, Source) else source
    if isinstance(what, str | os.PathLike):
        existing_path(what)
    elif not isinstance(what, Mapping | torch.nn.Module | Delta) and not callable(what):
        raise TypeError(f"DeltaBank.load: {name} must be {_KINDS}, or a Source, got {describe(source)}")


def resolved(source: SourceLike, name: str) -> tuple[Openable | Delta, Source]:
    """What there is to open, a callable called and a path in full, and how it was asked to be read."""
    how = source if isinstance(source, Source) else Source(source)
    what = how.what
    if callable(what) and not isinstance(what, torch.nn.Module | Mapping | Delta | os.PathLike):
        what = what()
    if isinstance(what, str | os.PathLike):
        # In full, so that a change of the working directory changes nothing.
        return existing_path(what).absolute(), how
    if not isinstance(what, Mapping | torch.nn.Module | Delta):
        raise TypeError(f"DeltaBank.load: {name} must give {_KINDS.partition(', or')[0]}, got {describe(what)}")
    return what, how


def open_source(what: Openable, how: Source, name: str, base: Base) -> Weights:
    """Open a counterfactual, and check its configuration, if it has one, against the base's.

    what: as ``resolved`` gives it
    how: the format and the choices that were asked for
    name: what the argument is called in messages about an object in memory
    base: the model that it is a counterfactual of
    Returns: its tensors, whose values are read when asked for
    Raises: CheckpointError for what cannot be read
    """
    if isinstance(what, torch.nn.Module):
        weights = from_module(unwrapped(what), name)
    elif isinstance(what, Mapping):
        weights = from_mapping(what, name)
    else:
        path = Path(what)
        weights = open_folder(path) if path.is_dir() else open_file(path)
    if base.config is not None:
        check_config(base.config, type(base.model), weights)
    return weights
