"""Typefaces: glyphs drawn from installed fonts. A font is a style, and a group; a glyph is an object."""

from __future__ import annotations

import hashlib
import math
import os
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from guda_fast._validate import check_choice, check_int, describe
from guda_fast.datasets.fonts import Font, find_fonts, standard_folders
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.diffusion.conditions import Conditions

CONDITIONS = ("none", "glyph", "font-glyph")
STYLES = ("regular", "all")
_FINER = 4  # glyphs are drawn this much larger, and averaged
_EXTENT = 0.85  # of the image, for the largest glyph of a font at its largest scale
_LEAST_SCALE = 0.8
_SHIFT = (1 - _EXTENT) / 2  # of the image to each side, so that nothing is cut off
_WHERE = "load_typefaces"


def load_typefaces(
    fonts: int | Sequence[str] | None = None,
    *,
    glyphs: str = string.ascii_uppercase,
    size: int = 32,
    repeats: int = 8,
    conditions: str = "glyph",
    null: bool = False,
    styles: str = "regular",
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> GroupedImages:
    """Glyphs in white on black [uint8], grouped by font.

    Every font draws every glyph ``repeats`` times, each scaled by 0.8 to 1 and shifted by up to 7.5 % of the image
    along both axes. An image depends on its font, glyph, number and the seed alone, not on what is drawn besides; but
    FreeType's versions differ in single grey values, which the manifest tells.

    fonts: how many of those that are found, in the order of their names, or which ones by name [None: all]
    glyphs: distinct characters; fonts that lack one are left out
    size: height and width [>= 8]. repeats: images of each font and glyph [>= 1]
    conditions: "glyph": class label g by glyph; "font-glyph": f G + g by font and glyph, and besides F G + g for the
        glyph without a font, which ``removed`` names and no image has; "none"
    null: append a label for no condition, after all others
    styles: "regular": one style of each family; "all": each style is a font of its own
    folder: where to look for fonts, with all below [None: the standard folders of the system]
    seed: of scales and shifts [0..2^63-1]

    Images are sorted by font, then glyph. Raises TypeError or ValueError naming the argument: also where there are not
    as many fonts, or not the ones named, with those that there are; FileNotFoundError where there is no such folder.

    >>> load_typefaces(2, size=16).counts()  # doctest: +SKIP
    {'DejaVu Sans Book': 208, 'DejaVu Serif Book': 208}
    """
    _check(glyphs, conditions, styles)
    check_int(_WHERE, "size", size, 8, 1024)
    check_int(_WHERE, "repeats", repeats, 1)
    check_int(_WHERE, "seed", seed, 0)
    where = None if folder is None else Path(folder)
    if where is not None and not where.is_dir():
        raise FileNotFoundError(f"{_WHERE}: folder must hold fonts, found no folder {where}")
    chosen = _chosen(find_fonts(glyphs, where, styles=styles), fonts, where)
    images = np.stack([image for font in chosen for image in _drawn(font, glyphs, size, repeats, seed)])
    each = len(glyphs) * repeats
    members = {font.name: torch.arange(k * each, (k + 1) * each) for k, font in enumerate(chosen)}
    made, no_label, removed = _conditions(len(chosen), len(glyphs), repeats, conditions, null)
    return GroupedImages(torch.from_numpy(images)[:, None], members, made, null=no_label, removed=removed)


def _check(glyphs: object, conditions: object, styles: object) -> None:
    if not isinstance(glyphs, str):
        raise TypeError(f"{_WHERE}: glyphs must be a text, got {describe(glyphs)}")
    if not glyphs or len(set(glyphs)) != len(glyphs) or any(glyph.isspace() for glyph in glyphs):
        raise ValueError(f"{_WHERE}: glyphs must be distinct characters that can be seen, got {describe(glyphs)}")
    check_choice(_WHERE, "conditions", conditions, CONDITIONS)
    check_choice(_WHERE, "styles", styles, STYLES)


def _chosen(found: list[Font], fonts: int | Sequence[str] | None, folder: Path | None) -> list[Font]:
    places = ", ".join(map(str, standard_folders() if folder is None else [folder]))
    if not found:
        raise ValueError(f"{_WHERE}: fonts with all glyphs must be in {places}, found none")
    if fonts is None:
        return found
    names = {font.name: font for font in found}
    if isinstance(fonts, str) or not isinstance(fonts, Sequence):
        count = check_int(_WHERE, "fonts", fonts, 1)
        if count > len(found):
            raise ValueError(
                f"{_WHERE}: fonts must be at most {len(found)}, those with all glyphs in {places}, got {count}"
            )
        return found[:count]
    missing = [name for name in fonts if name not in names]
    if missing or not fonts or len(set(fonts)) != len(fonts):
        raise ValueError(f"{_WHERE}: fonts must be distinct ones of {', '.join(names)}, got {describe(list(fonts))}")
    return [names[name] for name in fonts]


def _drawn(font: Font, glyphs: str, size: int, repeats: int, seed: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """The images of a font [each (size, size), uint8], by glyph."""
    canvas = size * _FINER
    widest, ascent, descent = _extents(font, glyphs, canvas)
    largest = canvas * _EXTENT * canvas / max(widest, ascent + descent)
    baseline = (canvas - (ascent + descent) * largest / canvas) / 2 + ascent * largest / canvas
    images = []
    for glyph in glyphs:
        for number in range(repeats):
            scale, right, down = _jitter(f"{seed} {font.name} {glyph} {number}")
            face = font.at(max(1, math.floor(largest * (_LEAST_SCALE + (1 - _LEAST_SCALE) * scale))))
            left, _, end, _ = face.getbbox(glyph, anchor="ls")
            x = (canvas - (end - left)) / 2 - left + (2 * right - 1) * _SHIFT * canvas
            y = baseline + (2 * down - 1) * _SHIFT * canvas
            picture = Image.new("L", (canvas, canvas))
            ImageDraw.Draw(picture).text((round(x), round(y)), glyph, fill=255, font=face, anchor="ls")
            images.append(np.asarray(picture.reduce(_FINER)))
    return images


def _extents(font: Font, glyphs: str, size: int) -> tuple[float, float, float]:
    """Width of the widest glyph, and how far glyphs reach above and below the baseline, at a size [pixels]."""
    boxes = [font.at(size).getbbox(glyph, anchor="ls") for glyph in glyphs]
    widest = max(right - left for left, _, right, _ in boxes)
    return widest, max(-top for _, top, _, _ in boxes), max(bottom for _, _, _, bottom in boxes)


def _jitter(name: str) -> tuple[float, float, float]:
    """Three numbers in [0, 1) that depend on a name alone."""
    digest = hashlib.blake2b(name.encode(), digest_size=12).digest()
    first, second, third = np.frombuffer(digest, dtype="<u4") / 2**32
    return float(first), float(second), float(third)


def _conditions(
    fonts: int, glyphs: int, repeats: int, kind: str, null: bool
) -> tuple[Conditions | None, int | None, Tensor | None]:
    """Conditions of all images, the row for none, and each row's without the font."""
    if kind == "none":
        if null:
            raise ValueError(f"{_WHERE}: null must come with conditions, got conditions 'none'")
        return None, None, None
    glyph = torch.arange(glyphs)
    if kind == "glyph":
        row, removed = glyph.repeat_interleave(repeats).repeat(fonts), glyph
    else:
        row = torch.arange(fonts * glyphs).repeat_interleave(repeats)
        removed = fonts * glyphs + glyph.repeat(fonts + 1)
    last = len(removed)
    labels = torch.arange(last + null)
    removed = torch.cat([removed, labels[last:]])
    return Conditions({"class_labels": labels}, row, tuple(labels.tolist())), last if null else None, removed
