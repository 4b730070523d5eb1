"""The files of the UnlearnCanvas scripts: images by style, prompts in JSON lines, checkpoints by step, the CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guda_fast._files import atomic_write
from guda_fast._json import read_lines
from guda_fast.diffusion.schedule import FloatArray


@dataclass(frozen=True)
class StyledImage:
    """An image, the style that it was generated in, and the object that it shows, as its path says."""

    path: Path
    style: str
    object: str


def find_images(folder: Path) -> list[StyledImage]:
    """Images ``<Style>/<Style_with_underscores>_<Object>.png``, sorted by style, then by name.

    Raises FileNotFoundError where there are none, ValueError naming a file that is called otherwise.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--image_dir: must be a folder with one sub-folder a style, found no folder {folder}")
    found = []
    for style in sorted(path for path in folder.iterdir() if path.is_dir()):
        prefix = style.name.replace(" ", "_") + "_"
        for path in sorted(style.glob("*.png")):
            if not path.stem.startswith(prefix) or path.stem == prefix:
                raise ValueError(f"{path}: must be called {prefix}<Object>.png, as images of its folder are")
            found.append(StyledImage(path, style.name, path.stem.removeprefix(prefix)))
    if not found:
        raise FileNotFoundError(f"--image_dir: must hold images <Style>/<Style>_<Object>.png, found none in {folder}")
    return found


def prompts_of(images: Sequence[StyledImage], file: Path) -> list[str]:
    """The prompt of each image, from JSON lines with ``style``, ``object`` and ``prompt``; spaces and underscores are
    the same in the first two.

    Raises FileNotFoundError, or ValueError naming the file with the line that is damaged or the image without prompt.
    """
    prompts: dict[tuple[str, str], tuple[str, str]] = {}
    for where, line in read_lines(file):
        style, thing, text = (line.get(key) for key in ("style", "object", "prompt"))
        if not (isinstance(style, str) and isinstance(thing, str) and isinstance(text, str)):
            raise ValueError(f"{where}: must have style, object and prompt, each a text, found {line}")
        prompt, first = prompts.setdefault(_key(style, thing), (text, where))
        if prompt != text:
            raise ValueError(
                f"{where}: must have the prompt of {first}, as both are of style {style!r} and object {thing!r}, found "
                f"{text!r} and {prompt!r}"
            )
    for image in images:
        if _key(image.style, image.object) not in prompts:
            raise ValueError(
                f"{file}: must have the prompt of {image.path}, found none of style {image.style!r} and object "
                f"{image.object!r}"
            )
    return [prompts[_key(image.style, image.object)][0] for image in images]


def _key(style: str, thing: str) -> tuple[str, str]:
    return style.replace(" ", "_"), thing.replace(" ", "_")


def checkpoint(folder: Path, step: int) -> Path | None:
    """The checkpoint of a step in a run's folder, or None: a folder as diffusers saves it, or a ``.pt`` file.

    Raises ValueError naming them where there are several.
    """
    names = (f"checkpoint_step_{step}", f"checkpoint-{step}", f"checkpoint_step_{step}.pt")
    found = [name for name in names if (folder / name).exists()]
    if len(found) > 1:
        raise ValueError(f"{folder}: must hold one checkpoint of step {step}, found {' and '.join(found)}")
    return folder / found[0] if found else None


def find_groups(parent: Path, step: int, styles: Sequence[str] | None) -> tuple[dict[str, Path], dict[str, Path]]:
    """Checkpoints by style, sorted, and where one was looked for in vain.

    styles: to look for [None for all sub-folders]. Raises FileNotFoundError where ``parent`` is no folder or empty.
    """
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent}: must be a folder with one sub-folder a style, found no such folder")
    if styles is None:
        styles = [path.name for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
        if not styles:
            raise FileNotFoundError(f"{parent}: must have one sub-folder a style, found none")
    found, missing = {}, {}
    for style in sorted(styles):
        path = checkpoint(parent / style, step)
        if path is None:
            missing[style] = parent / style / f"checkpoint_step_{step}.pt"
        else:
            found[style] = path
    return found, missing


def write_scores(
    path: Path, column: str, folder: Path, images: Sequence[StyledImage], scores: Mapping[str, FloatArray]
) -> None:
    """Write one row a cell, groups outermost; the file appears whole or not at all.

    column: of the score. folder: that ``image_path`` is relative to. scores: by group, rounded to float32 [(N,) each]
    """
    with atomic_write(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(["generated_style", "object_name", "attribution_style", column, "image_path"])
        for group, values in scores.items():
            rounded = values.astype(np.float32).astype(np.float64).tolist()
            for image, score in zip(images, rounded, strict=True):
                relative = image.path.relative_to(folder)
                writer.writerow([image.style, image.object, group, repr(score), str(relative)])
