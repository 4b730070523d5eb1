"""What the images of a folder are conditioned on, and made latents by, for guda-fast score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from guda_fast._json import read_lines

_KINDS = ("prompt", "label")


def conditioned(images: Path, conditions: Path | None, pipeline: Path, device: str | None) -> dict[str, Any]:
    """The arguments ``conditions`` and ``latents`` of attribute().

    images: the folder of queries
    conditions: JSON lines with ``file_name``, relative to it, and ``prompt`` or ``label``; other files' are left out
    pipeline: the folder whose text encoder prompts need, and whose VAE, if it has one, images
    device: of both [None: CUDA where there is one]

    Raises FileNotFoundError or ValueError naming the file and the line.
    """
    from guda_fast.datasets.latents import Latents

    given: dict[str, Any] = {}
    if (pipeline / "vae").is_dir():
        given["latents"] = Latents(pipeline, device=device)
    if conditions is not None:
        given["conditions"] = _joined(images, conditions, pipeline, device)
    return given


def _joined(images: Path, conditions: Path, pipeline: Path, device: str | None) -> Any:
    """The condition of each image, in the order of the queries."""
    from guda_fast.datasets.prompts import TextEncoder
    from guda_fast.datasets.queries import image_names

    kind, found = _read(conditions)
    names = image_names(images)
    missing = [name for name in names if name not in found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(
            f"{conditions}: must have a line for each image in {images}, found none for {missing[0]}{more}"
        )
    values = [found[name] for name in names]
    if kind == "label" or not values:
        return values
    text = TextEncoder(pipeline, device=device)
    with Image.open(images / names[0]) as first:
        width, height = first.size
    return text(values, size=(height, width) if text.takes_size else None)


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """What the lines say, "prompt" or "label", and of which file."""
    if not path.is_file():
        raise FileNotFoundError(f"--conditions: must be a file of JSON lines, found no file {path}")
    kinds, found = set[str](), dict[str, Any]()
    for where, line in read_lines(path):
        name, kind = line.get("file_name"), next((kind for kind in _KINDS if kind in line), "")
        value = line.get(kind)
        if not isinstance(name, str) or type(value) is not (int if kind == "label" else str):
            raise ValueError(
                f"{where}: must have 'file_name' and 'prompt', a text, or 'label', an integer, found {line}"
            )
        if found.setdefault(name, value) != value:
            raise ValueError(f"{where}: must be the only line for {name}, found another")
        kinds.add(kind)
    if len(kinds) != 1:
        raise ValueError(f"{path}: must have prompts or labels, found {' and '.join(sorted(kinds)) or 'no line'}")
    return kinds.pop(), found
