"""Training data by a line of text, for commands: a name or a folder, and choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from guda_fast._validate import describe
from guda_fast.datasets.digits import load_digits
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.datasets.labels import with_labels

_WHERE = "open_dataset"


@dataclass(frozen=True)
class _Choice:
    """A key's value. wanted: what it must be, in words. read: makes it of text, ValueError where it cannot."""

    wanted: str
    read: Callable[[str], Any]


@dataclass(frozen=True)
class _Source:
    """load: called with the values of the choices that are given, by name."""

    load: Callable[..., GroupedImages]
    choices: Mapping[str, _Choice]


def _one_of(*values: str) -> _Choice:
    def read(text: str) -> str:
        if text not in values:
            raise ValueError(text)
        return text

    return _Choice(f"one of {', '.join(values)}", read)


_YES = {"yes": True, "no": False}


def _yes(text: str) -> bool:
    if text not in _YES:
        raise ValueError(text)
    return _YES[text]


_FLAG = _Choice("yes or no", _yes)
# These are read here, for every source.
_COMMON = {"conditions": _one_of("none", "labels"), "null": _FLAG}
_SOURCES: dict[str, _Source] = {"digits": _Source(load_digits, {})}


def open_dataset(spec: str) -> GroupedImages:
    """Training data by a line of text: a name or a folder, then ``,key=value`` for each choice.

    spec: ``digits``, or others of docs/datasets.md, such as ``digits,conditions=labels,null=yes``

    Every source takes ``conditions=labels``, which conditions each image on its group (``with_labels``), and with it
    ``null=yes``, which appends a label for no condition.

    Raises ValueError where a name, a key or a value is not known, with the choices; and what the loader raises.

    >>> open_dataset("digits,conditions=labels").conditions.count
    10
    """
    source, given = _parsed(spec)
    conditions, null = given.pop("conditions", "none"), given.pop("null", False)
    if null and conditions != "labels":
        raise ValueError(f"{_WHERE}: null must come with conditions=labels, got {spec!r}")
    data = source.load(**given)
    return with_labels(data, null=null) if conditions == "labels" else data


def _parsed(spec: str) -> tuple[_Source, dict[str, Any]]:
    """The source, and the choices' values."""
    if not isinstance(spec, str):
        raise TypeError(f"{_WHERE}: spec must be a text, got {describe(spec)}")
    name, *items = spec.split(",")
    if name not in _SOURCES:
        raise ValueError(f"{_WHERE}: spec must begin with one of {', '.join(_SOURCES)} or a folder, got {name!r}")
    source = _SOURCES[name]
    choices = {**source.choices, **_COMMON}
    given: dict[str, Any] = {}
    for item in items:
        key, sign, text = item.partition("=")
        if not sign or key not in choices:
            raise ValueError(f"{_WHERE}: {name} takes {', '.join(f'{key}=' for key in choices)}, got {item!r}")
        if key in given:
            raise ValueError(f"{_WHERE}: {key} must be given once, got {spec!r}")
        try:
            given[key] = choices[key].read(text)
        except ValueError as error:
            raise ValueError(f"{_WHERE}: {name},{key}= must be {choices[key].wanted}, got {text!r}") from error
    return source, given
