"""Unlearned models named on a command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

_WEIGHTS = (".safetensors", ".pt", ".bin", ".ckpt")


def named_sources(entries: Iterable[str], option: str) -> dict[str, Path]:
    """The models in NAME=PATH entries, in their order.

    option: what the entries are called in messages
    """
    found: dict[str, Path] = {}
    for entry in entries:
        name, separator, path = entry.partition("=")
        if not (name and separator and path):
            raise ValueError(f"{option}: must be NAME=PATH, got {entry!r}")
        if name in found:
            raise ValueError(f"{option}: names must differ, got {name!r} twice")
        found[name] = Path(path)
    return found


def sources_in(folder: Path, others: Mapping[str, Path], option: str) -> dict[str, Path]:
    """The models in a folder, one a sub-folder or weights file, named by it.

    others: models named by ``option``, whose names must not come again
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--groups: must be a folder, found no folder {folder}")
    found: dict[str, Path] = {}
    for source in sorted(folder.iterdir()):
        if source.name.startswith(".") or not (source.is_dir() or source.suffix in _WEIGHTS):
            continue
        name = source.name if source.is_dir() else source.stem
        if name in found or name in others:
            raise ValueError(f"--groups: names must differ, also from those of {option}, got {name!r} twice")
        found[name] = source
    return found


def all_sources(entries: Iterable[str] | None, folder: Path | None, option: str) -> dict[str, Path]:
    """The models of NAME=PATH entries, then those in a folder; ValueError where there is none."""
    found = named_sources(entries or (), option)
    if folder is not None:
        found |= sources_in(folder, found, option)
    if not found:
        where = f"; {folder} has no sub-folder" if folder is not None else ""
        raise ValueError(f"{option} or --groups: must name at least one unlearned model, got none{where}")
    return found
