"""Unlearned models named on a command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from guda_fast.deltas.formats.diffusers import is_shard
from guda_fast.deltas.formats.state_dict import looks_like_weights
from guda_fast.deltas.sources import Source

_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_CHOICES = ("format", "weights", "scale", "variant")
"""What may follow a path, as for a Source."""


def named_sources(entries: Iterable[str], option: str) -> dict[str, Source]:
    """The models in NAME=PATH[,CHOICE=VALUE]... entries, in their order.

    A comma needs no quotes in a shell, and is part of the path unless one of the four choices follows it.

    option: what the entries are called in messages

    >>> named_sources(["cat=a,b.pt,weights=ema,format=ema"], "--group")["cat"]  # doctest: +ELLIPSIS
    Source(what=...Path('a,b.pt'), format='ema', weights='ema', scale=1.0, variant=None)
    """
    found: dict[str, Source] = {}
    for entry in entries:
        name, path, choices = _parts(entry)
        if not (name and path):
            raise ValueError(f"{option}: must be NAME=PATH, got {entry!r}")
        if name in found:
            raise ValueError(f"{option}: names must differ, got {name!r} twice")
        if choices and Path(entry.partition("=")[2]).exists():
            raise ValueError(
                f"{option}: must say one thing, got {entry!r}, whose choices are part of a file's name too"
            )
        _, comma, last = path.rpartition(",")
        word, separator, _ = last.partition("=")
        if comma and separator and not Path(path).exists():
            raise ValueError(
                f"{option}: what follows a path must be one of {', '.join(_CHOICES)}, got {word!r} in {entry!r}"
            )
        try:
            given: dict[str, Any] = {
                choice: float(value) if choice == "scale" else value for choice, value in choices.items()
            }
            found[name] = Source(Path(path), **given)
        except ValueError as error:
            raise ValueError(f"{option}: {name}: {error}") from error
    return found


def in_full(entry: str) -> str:
    """The same NAME=PATH[,CHOICE=VALUE]... entry, to be read from any folder."""
    name, path, choices = _parts(entry)
    return ",".join([f"{name}={Path(path).absolute()}", *(f"{key}={value}" for key, value in choices.items())])


def sources_in(folder: Path, others: Mapping[str, object], option: str, where: str = "--groups") -> dict[str, Source]:
    """The models in a folder, one a sub-folder or weights file, named by it.

    others: models named by ``option``, whose names must not come again
    where: the option that names the folder
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{where}: must be a folder, found no folder {folder}")
    found: dict[str, Source] = {}
    for source in sorted(folder.iterdir()):
        if source.name.startswith(".") or not (source.is_dir() or _is_weights(source, where)):
            continue
        name = source.name if source.is_dir() else source.stem
        if name in found or name in others:
            raise ValueError(f"{where}: names must differ, also from those of {option}, got {name!r} twice")
        found[name] = Source(source)
    return found


def _is_weights(file: Path, where: str) -> bool:
    """Whether a file is one of weights, by its ending; one that only its content says so of is an error."""
    if file.suffix.lower() not in _WEIGHTS:
        if file.is_file() and looks_like_weights(file):
            raise ValueError(f"{where}: weights must end with one of {', '.join(_WEIGHTS)}, found weights in {file}")
        return False
    if is_shard(file):
        raise ValueError(f"{where}: must hold whole models, found {file}, one shard of one: name its folder instead")
    return True


def all_sources(entries: Iterable[str] | None, folder: Path | None, option: str) -> dict[str, Source]:
    """The models of NAME=PATH entries, then those in a folder; ValueError where there is none."""
    found = named_sources(entries or (), option)
    if folder is not None:
        found |= sources_in(folder, found, option)
    if not found:
        where = f"; {folder} has no sub-folder and no weights file" if folder is not None else ""
        raise ValueError(f"{option} or --groups: must name at least one unlearned model, got none{where}")
    return found


def _parts(entry: str) -> tuple[str, str, dict[str, Any]]:
    """The name, the path, and the choices after it."""
    name, _, path = entry.partition("=")
    choices: dict[str, Any] = {}
    while True:
        rest, _, last = path.rpartition(",")
        choice, separator, value = last.partition("=")
        if not (separator and choice in _CHOICES):
            return name, path, choices
        if choice in choices:
            raise ValueError(f"{name}: must have {choice}= once, got {entry!r}")
        path, choices = rest, {choice: value, **choices}
