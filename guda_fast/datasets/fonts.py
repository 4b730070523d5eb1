"""The fonts that are installed: one file for each name, and only those that have the glyphs asked for."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
_REGULAR = ("regular", "book", "roman", "normal", "medium")
_PROBE = 32  # pixels of the glyphs that are looked at
# No character, and never will be: what a font draws here it draws for all that it does not have.
_MISSING = "\uffff"


@dataclass(frozen=True)
class Font:
    """A font file. name: family and style. family, style: as the file says."""

    path: Path
    family: str
    style: str

    @property
    def name(self) -> str:
        return f"{self.family} {self.style}".strip()

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The font at a size in pixels."""
        return _opened(self.path, size)


@lru_cache(maxsize=256)
def _opened(path: Path, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout: not every installation of Pillow has the other one, and single glyphs need none.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def standard_folders() -> list[Path]:
    """Where this system keeps fonts, for everybody and for the user."""
    home = Path.home()
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    if sys.platform == "win32":
        return [Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts"]
    return [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".local/share/fonts", home / ".fonts"]


def find_fonts(glyphs: str, folder: Path | None = None, *, styles: str = "regular") -> list[Font]:
    """The fonts that have all glyphs and a space, as fonts for text have, sorted by name.

    Of files with one name, as some families have for all styles, the one with the shortest file name is taken; of
    fonts that draw all glyphs alike, as renamed copies do, the first by name.

    glyphs: distinct characters. folder: where to look, with all below [None: the standard folders]
    styles: "regular": of each family its regular style, or its first; "all": every style is a font

    Raises ValueError naming a file in ``folder`` that is no font; in the standard folders it is left out with a
    warning.
    """
    named: dict[str, Font] = {}
    for path in _files(standard_folders() if folder is None else [folder]):
        font = _read(path, warn=folder is None)
        if font is not None:
            named.setdefault(font.name, font)
    fonts = [named[name] for name in sorted(named)]
    drawn: dict[tuple[bytes, ...], Font] = {}
    families = set[str]()
    for font in sorted(fonts, key=_regular_first) if styles == "regular" else fonts:
        pictures = None if font.family in families else _pictures(font, glyphs)
        if pictures is None:
            continue
        drawn.setdefault(pictures, font)
        if styles == "regular":
            families.add(font.family)
    return sorted(drawn.values(), key=lambda font: font.name)


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        found = (path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
        yield from sorted(found, key=lambda path: (len(path.name), path))


def _read(path: Path, *, warn: bool) -> Font | None:
    try:
        family, style = _opened(path, _PROBE).getname()
    except OSError as error:
        message = f"{path}: must be a font, found a file that cannot be read as one ({error})"
        if not warn:
            raise ValueError(message) from error
        warnings.warn(message, stacklevel=4)
        return None
    # A font without a name cannot be told from others.
    return Font(path, family, style or "") if family else None


def _regular_first(font: Font) -> tuple[str, int, str]:
    style = font.style.lower()
    return font.family, _REGULAR.index(style) if style in _REGULAR else len(_REGULAR), font.name


def _pictures(font: Font, glyphs: str) -> tuple[bytes, ...] | None:
    """How the font draws each glyph; None where it lacks one, draws most of them alike, or is no font for text."""
    # Fonts of symbols, which have signs in the place of letters, have no space, and those of placeholders a drawn one.
    if font.at(_PROBE).getlength(" ") == 0 or _picture(font, " "):
        return None
    missing = _picture(font, _MISSING)
    found = [_picture(font, glyph) for glyph in glyphs]
    if not all(found) or missing in found:
        return None
    # "I" and "l" are alike in some fonts, and capitals and small letters in others.
    return tuple(found) if 2 * len(set(found)) >= len(found) else None


def _picture(font: Font, glyph: str) -> bytes:
    """Size and pixels; nothing where no pixel has ink, or the font is damaged there."""
    try:
        mask = font.at(_PROBE).getmask(glyph, mode="L")
    except OSError:
        return b""
    pixels = bytes(mask)
    return f"{mask.size} ".encode() + pixels if any(pixels) else b""
