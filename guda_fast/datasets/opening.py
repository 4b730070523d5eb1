"""Training data by a line of text, for commands: a name or a folder, and choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from guda_fast._validate import describe
from guda_fast.datasets import cifar10, fashion_mnist, typefaces
from guda_fast.datasets.cifar10 import load_cifar10
from guda_fast.datasets.digits import load_digits
from guda_fast.datasets.fashion_mnist import load_fashion_mnist
from guda_fast.datasets.folder import load_folder
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.datasets.labels import with_labels
from guda_fast.datasets.thinning import thinned
from guda_fast.datasets.typefaces import load_typefaces

_WHERE = "open_dataset"


@dataclass(frozen=True)
class _Choice:
    """A key's value. wanted: what it must be, in words. read: makes it of text, ValueError where it cannot."""

    wanted: str
    read: Callable[[str], Any]


@dataclass(frozen=True)
class _Source:
    """load: called with the values of the choices that are given, by name, which must be those ``needed``.

    conditions: kinds besides none and labels, which ``load`` makes. default: the kind where none is given.
    """

    load: Callable[..., GroupedImages]
    choices: Mapping[str, _Choice]
    needed: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    default: str = "none"


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


def _path(text: str) -> Path:
    if not text:
        raise ValueError(text)
    return Path(text).expanduser()


def _fonts(text: str) -> int | list[str]:
    return int(text) if text.isdecimal() else [name for name in text.split("+") if name]


_NUMBER, _FLAG, _PATH = _Choice("an integer", int), _Choice("yes or no", _yes), _Choice("a folder", _path)
# These are read here, for every source.
_COMMON = {"null": _FLAG, "per_group": _NUMBER}
_PLAIN = ("none", "labels")
_IMAGES = {"size": _NUMBER, "channels": _NUMBER, "text": _PATH}
_SOURCES: dict[str, _Source] = {
    "digits": _Source(load_digits, {}),
    "fashion-mnist": _Source(
        load_fashion_mnist, {"folder": _PATH, "size": _NUMBER, "split": _one_of(*fashion_mnist.SPLITS)}
    ),
    "cifar10": _Source(load_cifar10, {"folder": _PATH, "split": _one_of(*cifar10.SPLITS)}, needed=("folder",)),
    "typefaces": _Source(
        load_typefaces,
        {
            "fonts": _Choice("how many, or names with + between them", _fonts),
            "glyphs": _Choice("characters", str),
            "size": _NUMBER,
            "repeats": _NUMBER,
            "styles": _one_of(*typefaces.STYLES),
            "folder": _PATH,
            "seed": _NUMBER,
        },
        conditions=("glyph", "font-glyph"),
        default="glyph",
    ),
}


def open_dataset(spec: str) -> GroupedImages:
    """Training data by a line of text: a name or a folder of images, then ``,key=value`` for each choice.

    spec: ``digits``, ``fashion-mnist,size=16``, ``cifar10,folder=cifar-10-batches-py``, ``typefaces,fonts=12,size=16``,
        ``paintings,size=64,conditions=metadata,text=sd15``; all choices are in docs/datasets.md. A folder that has a
        source's name is ``./digits``.

    Every source takes ``conditions=labels``, which conditions each image on its group (`with_labels`), ``null=yes``,
    which appends a label for no condition, and ``per_group=100`` (`thinned`).

    Raises ValueError where a name, a key or a value is not known, with the choices; and what the loader raises.

    >>> open_dataset("digits,conditions=labels").conditions.count
    10
    """
    source, given = _parsed(spec)
    conditions, null = given.pop("conditions", source.default), given.pop("null", False)
    per_group = given.pop("per_group", None)
    if null and conditions == "none":
        raise ValueError(f"{_WHERE}: null must come with conditions, got {describe(spec)}")
    if source.conditions:
        own = {"conditions": "none"} if conditions in _PLAIN else {"conditions": conditions, "null": null}
        given.update(own)
    data = source.load(**given)
    if conditions == "labels":
        data = with_labels(data, null=null)
    return data if per_group is None else thinned(data, per_group)


def _parsed(spec: str) -> tuple[_Source, dict[str, Any]]:
    """The source, and the choices' values."""
    if not isinstance(spec, str):
        raise TypeError(f"{_WHERE}: spec must be a text, got {describe(spec)}")
    name, *items = spec.split(",")
    source = _source(name)
    choices = {**source.choices, "conditions": _one_of(*_PLAIN, *source.conditions), **_COMMON}
    given: dict[str, Any] = {}
    for item in items:
        key, sign, text = item.partition("=")
        if not sign or key not in choices:
            raise ValueError(f"{_WHERE}: {name} takes {', '.join(f'{key}=' for key in choices)}, got {describe(item)}")
        if key in given:
            raise ValueError(f"{_WHERE}: {key} must be given once, got {describe(spec)}")
        try:
            given[key] = choices[key].read(text)
        except ValueError as error:
            raise ValueError(f"{_WHERE}: {name},{key}= must be {choices[key].wanted}, got {describe(text)}") from error
    missing = [key for key in source.needed if key not in given]
    if missing:
        raise ValueError(
            f"{_WHERE}: {name} must come with {', '.join(f'{key}=' for key in missing)}, got {describe(spec)}"
        )
    return source, given


def _source(name: str) -> _Source:
    """What is known by a name, or a folder of images."""
    if name in _SOURCES:
        return _SOURCES[name]
    folder = Path(name).expanduser()
    if not name or not folder.is_dir():
        raise ValueError(
            f"{_WHERE}: spec must begin with one of {', '.join(_SOURCES)}, or a folder of images, got {describe(name)}"
        )
    return _Source(partial(load_folder, folder), _IMAGES, conditions=("metadata",))
