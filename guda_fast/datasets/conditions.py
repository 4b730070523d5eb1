"""What callers give as conditions, made into `Conditions`, and what a model has to be given."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guda_fast._validate import check_int, check_tensor, describe
from guda_fast.diffusion.conditions import Conditions, Given, flat, map_tensors

ConditionSource = Conditions | Mapping[str, Given] | Sequence[int] | Tensor | np.ndarray[Any, Any]
"""Conditions, as a `TextEncoder` gives; tensors by the name of the model's argument, with a row a query; or class
labels [N, integers]."""

_WHERE = "attribute"
# What a model has to be given where its configuration has an entry, if its forward takes that.
_PROMPT, _LABELS, _POOLED = "encoder_hidden_states", "class_labels", "pooled_projections"
_NEEDED = {
    "cross_attention_dim": _PROMPT,
    "joint_attention_dim": _PROMPT,
    "pooled_projection_dim": _POOLED,
    "num_class_embeds": _LABELS,
    "class_embed_type": _LABELS,
    "num_embeds_ada_norm": _LABELS,
}
_ADDED = {"text_time": ("added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids")}
# The first of these that a configuration has: what projects a prompt comes before what it is projected to.
_FEATURES = {
    _PROMPT: ("encoder_hid_dim", "caption_channels", "cross_attention_dim", "joint_attention_dim"),
    _POOLED: ("pooled_projection_dim",),
}
_CLASSES = {"num_class_embeds": 0, "num_embeds_ada_norm": 1}  # and how many labels more: DiT has one for no class
_OWN = ("timestep", "return_dict")  # arguments that no condition may have


def load_conditions(given: ConditionSource | None, queries: int) -> Conditions:
    """Conditions of as many queries, each distinct one once.

    given: None for an unconditional model. Raises TypeError or ValueError naming the argument.

    >>> load_conditions([3, 8, 3], queries=3).row.tolist()
    [0, 1, 0]
    """
    if given is None:
        return Conditions.none(queries)
    if isinstance(given, Conditions):
        found = given if given.keys is not None or not given.tensors else _distinct(given)
    elif isinstance(given, Mapping):
        found = _of_rows(given, queries)
    else:
        found = _of_labels(given)
    if len(found) != queries:
        raise ValueError(f"{_WHERE}: conditions must be those of {queries} queries, got those of {len(found)}")
    if found.source or not found.tensors:
        return found
    # Ids of the caller's own, and keys, may stay the same where tensors do not.
    digests = found.digests()
    values = hashlib.blake2b(b"".join(digests[row] for row in found.row.tolist()), digest_size=16).hexdigest()
    return replace(found, source={"values": values})


def check_conditions(model: nn.Module, conditions: Conditions) -> None:
    """Raise ValueError where a model needs what is not there, or cannot take what is."""
    config = getattr(model, "config", None)
    config = config if isinstance(config, Mapping) else {}
    kind, found = type(model).__name__, flat(conditions.tensors)
    taken = inspect.signature(model.forward).parameters
    _check_forward(kind, taken)
    needed = {name: because for name, because in _needed(config).items() if name.partition(".")[0] in taken}
    missing = [f"{name} ({because})" for name, because in needed.items() if name not in found]
    if missing:
        raise ValueError(
            f"{_WHERE}: conditions must give {kind} its {', '.join(missing)}, got {_names(found)}; "
            "see attribute's conditions"
        )
    known = {*_NEEDED.values(), *(name for names in _ADDED.values() for name in names)}
    unwanted = [name for name in found if config and name in known and name not in needed]
    if unwanted:
        wanted = _names(needed) if needed else "None, because it is unconditional"
        raise ValueError(f"{_WHERE}: conditions must be what {kind} takes ({wanted}), got {_names(unwanted)}")
    _check_arguments(kind, taken, conditions.tensors)
    _check_values(config, found)


def _names(tensors: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(tensors) or "none"


def _needed(config: Mapping[str, Any]) -> dict[str, str]:
    """What a model of this configuration needs, and which entry says so."""
    needed = {_NEEDED[key]: f"{key}={config[key]}" for key in _NEEDED if config.get(key) is not None}
    kind = config.get("addition_embed_type")
    return needed | dict.fromkeys(_ADDED.get(kind or "", ()), f"addition_embed_type={kind}")


def _check_forward(kind: str, parameters: Mapping[str, inspect.Parameter]) -> None:
    if not (_any_name(parameters) or set(_OWN) <= set(parameters)):
        raise ValueError(
            f"{_WHERE}: bank must hold a model whose forward takes {' and '.join(_OWN)} by name, as those of diffusers "
            f"do, got {kind}.forward({', '.join(parameters)})"
        )


def _any_name(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def _check_arguments(kind: str, parameters: Mapping[str, inspect.Parameter], tensors: Mapping[str, Given]) -> None:
    if _any_name(parameters):
        return
    first = next(iter(parameters))
    for name in tensors:
        if name not in parameters or name in (*_OWN, first):
            raise ValueError(
                f"{_WHERE}: conditions must be arguments of {kind}.forward beside {first} and timestep, got {name!r}"
            )


def _check_values(config: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    """What models find wrong in a layer far inside, or on a GPU not at all."""
    for name, tensor in found.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{_WHERE}: conditions must have finite {name}, got NaN or infinity")
    features = {name: next((config[key] for key in keys if config.get(key)), None) for name, keys in _FEATURES.items()}
    for name, size in features.items():
        if name in found and isinstance(size, int) and found[name].shape[-1] != size:
            raise ValueError(f"{_WHERE}: conditions must have {name} with {size} features, got {describe(found[name])}")
    classes = next((config[key] + more for key, more in _CLASSES.items() if isinstance(config.get(key), int)), None)
    labels = found.get(_LABELS)
    if labels is not None and classes is not None and not labels.is_floating_point():
        check_int(_WHERE, "class label", int(labels.min()), 0, classes - 1)
        check_int(_WHERE, "class label", int(labels.max()), 0, classes - 1)


def _of_labels(given: object) -> Conditions:
    if isinstance(given, str) or (isinstance(given, Sequence) and any(isinstance(one, str) for one in given)):
        raise TypeError(
            f"{_WHERE}: conditions must be embedded prompts, got text; make them by a text encoder: "
            "gf.TextEncoder(folder)(prompts)"
        )
    if not isinstance(given, Sequence | Tensor | np.ndarray):
        raise TypeError(
            f"{_WHERE}: conditions must be Conditions, tensors by name or class labels, got {describe(given)}"
        )
    values = given.tolist() if isinstance(given, Tensor | np.ndarray) else list(given)
    labels = [check_int(_WHERE, "class label", value, 0) for value in values]
    distinct, row = np.unique(np.array(labels, dtype=np.int64), return_inverse=True)
    return Conditions(
        {_LABELS: torch.from_numpy(distinct)}, torch.from_numpy(row.reshape(-1)), tuple(distinct.tolist())
    )


def _of_rows(given: Mapping[str, Given], queries: int) -> Conditions:
    """Tensors with a row a query."""
    for name, tensor in flat(given).items():
        check_tensor(_WHERE, f"conditions[{name!r}]", tensor, min_dim=1)
        if len(tensor) != queries:
            raise ValueError(
                f"{_WHERE}: conditions[{name!r}] must have {queries} rows, one a query, got {describe(tensor)}"
            )
    return _distinct(Conditions(given, torch.arange(queries)))


def _distinct(conditions: Conditions) -> Conditions:
    """The same with equal conditions once, and their digests as keys."""
    digests = conditions.digests()
    first = {digest: number for number, digest in reversed([*enumerate(digests)])}
    kept = sorted(first.values())
    position = {number: place for place, number in enumerate(kept)}
    row = torch.tensor([position[first[digest]] for digest in digests], dtype=torch.int64)[conditions.row]
    tensors = map_tensors(lambda tensor: tensor.detach()[kept], conditions.tensors)
    return replace(conditions, tensors=tensors, row=row, keys=tuple(digests[number] for number in kept))
