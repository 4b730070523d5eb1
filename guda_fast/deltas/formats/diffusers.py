"""Model folders as diffusers' ``save_pretrained`` writes them: flat, in a pipeline, sharded, variants."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from guda_fast._json import read_object
from guda_fast.deltas.formats.state_dict import open_file
from guda_fast.deltas.weights import Entry, Weights
from guda_fast.errors import CheckpointError

_COMPONENTS = ("", "unet", "transformer")
_AVERAGES = ("unet_ema", "transformer_ema")
_SHADOW_FILE = "ema_model.pt"
# What EMAModel.save_pretrained writes into the model's configuration.
_EMA_SETTINGS = {
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"
}  # fmt: skip
_STEM = "diffusion_pytorch_model"
_SINGLE = re.compile(rf"{_STEM}(?:\.(?P<variant>[\w-]+))?\.(?P<format>safetensors|bin)")
_INDEX = re.compile(rf"{_STEM}\.(?P<format>safetensors|bin)\.index(?:\.(?P<variant>[\w-]+))?\.json")
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.(safetensors|bin)")
_MAX_SHOWN = 5


def model_folder(folder: Path) -> Path:
    """The folder that holds the model: ``folder`` itself, its ``unet/`` or ``transformer/``, or else ``unet_ema/``.

    Raises: CheckpointError when there is no model, or more than one
    """
    found = _models(folder, _COMPONENTS) or _models(folder, _AVERAGES)
    if len(found) > 1:
        raise CheckpointError(f"{folder}: holds several models, pass one of {', '.join(map(str, found))}")
    if not found:
        raise CheckpointError(
            f"{folder}: no diffusers model here: no config.json in the folder, in unet/ or in transformer/"
        )
    return found[0]


def holds_model(folder: Path) -> bool:
    """Whether there is a model with weights in the folder, or in the sub-folders in which a pipeline has one."""
    models = _models(folder, (*_COMPONENTS, *_AVERAGES))
    return any(_INDEX.fullmatch(path.name) or _SINGLE.fullmatch(path.name) for m in models for path in m.iterdir())


def is_shard(path: Path) -> bool:
    """Whether a file is one of several that hold a model together: by its name, or by an index beside it."""
    if _SHARD.fullmatch(path.name):
        return True
    indices = (index for index in path.parent.glob("*.index*.json") if index.is_file())
    maps = (read_json(index).get("weight_map") for index in indices)
    return any(path.name in weight_map.values() for weight_map in maps if isinstance(weight_map, dict))


def open_folder(folder: Path, *, variant: str | None = None, average: bool = False) -> Weights:
    """Open the model in a diffusers folder; values are read when asked for.

    variant: which of several files to take; None for the plain one
    average: take the moving average, from ``unet_ema/`` or from ``ema_model.pt`` (then as shadow parameters)
    Raises: CheckpointError where what is asked for is not there, or cannot be read
    """
    if average:
        folder = _average(folder)
        shadows = folder / _SHADOW_FILE
        if shadows.is_file():
            return _configured(open_file(shadows, average=True), folder / "config.json")
    folder = model_folder(folder)
    weights = _weights_file(folder, variant)
    opened = _open_shards(weights) if weights.suffix == ".json" else open_file(weights)
    return _configured(opened, folder / "config.json")


def _models(folder: Path, parts: Iterable[str]) -> list[Path]:
    return [folder / part for part in parts if (folder / part / "config.json").is_file()]


def _average(folder: Path) -> Path:
    """The folder that holds the moving average: a model of its own, or one with ``ema_model.pt`` beside its weights."""
    found = _models(folder, _AVERAGES)
    found += [path for path in _models(folder, _COMPONENTS) if (path / _SHADOW_FILE).is_file()]
    if folder.name in _AVERAGES and not found:
        return folder
    if len(found) != 1:
        listed = ", ".join(map(str, found)) or f"no {_SHADOW_FILE} beside the weights, and no unet_ema/"
        raise CheckpointError(f"{folder}: must hold one moving average, found {listed}")
    return found[0]


def _configured(weights: Weights, config: Path) -> Weights:
    return replace(weights, config=read_json(config), config_origin=str(config), files=(*weights.files, config))


def find_scheduler(folder: Path) -> dict[str, Any] | None:
    """The scheduler configuration of a model folder: inside it, in ``scheduler/``, or beside it; None without."""
    folder = folder.resolve()
    places = [folder, folder / "scheduler", folder.parent / "scheduler"]
    if folder.name in _COMPONENTS:
        places.append(folder.parent)
    for place in places:
        path = place / "scheduler_config.json"
        if path.is_file():
            return read_json(path)
    return None


def build_model(config: Mapping[str, Any], origin: str) -> torch.nn.Module:
    """An untrained model from a diffusers configuration; leaves torch's random state as it was."""
    import diffusers

    name = config.get("_class_name")
    model_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, diffusers.ModelMixin)):
        raise CheckpointError(
            f"{origin}: '_class_name' must be a model of diffusers {diffusers.__version__}, found {name!r}; "
            "for a model of your own, pass the torch.nn.Module"
        )
    from_config: Any = model_class.from_config
    try:
        with torch.random.fork_rng(devices=[]):
            model: torch.nn.Module = from_config(_own_settings(model_class, config))
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{origin}: {name} cannot be built from this configuration: {error}") from error
    return model


def _own_settings(model_class: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what EMAModel added to it."""
    foreign = _EMA_SETTINGS - inspect.signature(model_class).parameters.keys()
    return {key: value for key, value in config.items() if key not in foreign}


def complete_config(model_class: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in JSON's types with the class's defaults filled in, and without private keys."""
    parameters = inspect.signature(model_class).parameters.values()
    complete = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    own = _own_settings(model_class, config)
    complete.update((key, value) for key, value in own.items() if not key.startswith("_"))
    complete["_class_name"] = config.get("_class_name", model_class.__name__)
    plain: dict[str, Any] = json.loads(json.dumps(complete, default=str))
    return plain


def check_config(base: Mapping[str, Any], model_class: type, weights: Weights) -> None:
    """Compare the configuration of ``weights``, if it has one, with the base's complete one."""
    if weights.config is None:
        return
    found = complete_config(model_class, weights.config)
    different = [key for key in sorted(base.keys() | found.keys()) if _item(base, key) != _item(found, key)]
    if different:
        listed = ", ".join(
            f"{key!r} must be {_item(base, key)} as in the base, found {_item(found, key)}"
            for key in different[:_MAX_SHOWN]
        )
        rest = len(different) - _MAX_SHOWN
        more = f" (and {rest} more)" if rest > 0 else ""
        raise CheckpointError(f"{weights.config_origin}: {listed}{more}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        return read_object(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _item(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "nothing"


def _weights_file(folder: Path, variant: str | None) -> Path:
    """The weights of the folder: the plain ones before variants, safetensors before pickles."""
    found: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(folder.iterdir()):
        match = _INDEX.fullmatch(path.name) or _SINGLE.fullmatch(path.name)
        if match and path.is_file() and not _SHARD.fullmatch(path.name):
            found.setdefault(match["variant"] or "", {}).setdefault(match["format"], []).append(path)
    if not found:
        raise CheckpointError(f"{folder}: no weights: no {_STEM}.safetensors or .bin, whole or sharded")
    listed = ", ".join(sorted(filter(None, found))) or "none"
    if variant is not None and (not variant or variant not in found):
        raise CheckpointError(f"{folder}: must have the variant {variant!r}, found {listed}")
    if variant is None and "" not in found and len(found) > 1:
        raise CheckpointError(
            f"{folder}: several variants ({listed}), pass the file of one of them, or Source(..., variant=)"
        )
    formats = found[variant] if variant is not None else found.get("", next(iter(found.values())))
    paths = formats.get("safetensors") or formats["bin"]
    if len(paths) > 1:
        raise CheckpointError(f"{folder}: both whole and sharded weights ({', '.join(p.name for p in paths)})")
    return paths[0]


def _open_shards(index: Path) -> Weights:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: 'weight_map' must be an object, found {type(weight_map).__name__}")
    for key, name in weight_map.items():
        if not (isinstance(name, str) and name not in ("", ".", "..") and name == Path(name).name):
            raise CheckpointError(f"{index}: key {key!r} must be in a file of this folder, found {name!r}")
    entries: dict[str, Entry] = {}
    files = [index]
    for name in sorted(set(weight_map.values())):
        shard = open_file(index.parent / name)
        files.extend(shard.files)
        for key, entry in shard.entries.items():
            if weight_map.get(key) != name:
                raise CheckpointError(f"{entry.origin}: key {key!r} is not listed for this file in {index.name}")
            entries[key] = entry
    if missing := sorted(weight_map.keys() - entries.keys()):
        more = f" (and {len(missing) - 1} more keys)" if len(missing) > 1 else ""
        where = index.parent / weight_map[missing[0]]
        raise CheckpointError(f"{where}: key {missing[0]!r} is missing, {index.name} lists it{more}")
    return Weights(str(index), entries, files=tuple(files))
