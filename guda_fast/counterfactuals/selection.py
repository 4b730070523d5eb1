"""Which parameters of a model a run changes."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

_VALUES_OF = {"cross-attention": ("",), "cross-attention-kv": ("to_k.", "to_v.", "add_k_proj.", "add_v_proj.")}


def selected(model: nn.Module, trained: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names of the parameters that ``TrainConfig.trained`` selects, in the order of the module.

    Cross-attention is what diffusers marks with ``is_cross_attention``: attention to tokens of a condition.
    Raises ValueError naming a pattern that selects nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    if trained == "all":
        return tuple(names)
    if isinstance(trained, str):
        layers = [name for name, module in model.named_modules() if getattr(module, "is_cross_attention", False)]
        prefixes = tuple(f"{layer}.{part}" for layer in layers for part in _VALUES_OF[trained])
        found = {name for name in names if name.startswith(prefixes)}
        _check(bool(found), trained, model)
        return tuple(name for name in names if name in found)
    _check(bool(trained), trained, model)
    for pattern in trained:
        _check(any(fnmatchcase(name, pattern) for name in names), pattern, model)
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in trained))


def _check(found: bool, trained: object, model: nn.Module) -> None:
    if not found:
        raise ValueError(f"train: trained must select parameters of {type(model).__name__}, got {trained!r}")
