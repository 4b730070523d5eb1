"""Typefaces: fonts found and told apart, what is drawn, and conditions; with the fonts that matplotlib ships."""

from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib
import pytest
import torch
from fontTools.ttLib import TTFont
from PIL import ImageFont

from guda_fast.datasets import load_typefaces
from guda_fast.datasets.fonts import find_fonts, standard_folders

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SANS, SERIF = "DejaVu Sans Book", "DejaVu Serif Book"


def names(folder: Path, glyphs: str = "AB", **options: str) -> list[str]:
    return [font.name for font in find_fonts(glyphs, folder, **options)]


def renamed(source: Path, target: Path, family: str) -> None:
    with TTFont(source) as font:
        for record in font["name"].names:
            if record.nameID in (1, 16):
                record.string = family
        font.save(target)


def test_one_style_of_each_family_or_all() -> None:
    regular, every = names(FONTS), names(FONTS, styles="all")
    assert regular == sorted(regular) and every == sorted(every)
    assert {SANS, "DejaVu Sans Mono Book", SERIF, "STIXGeneral Regular", "cmr10 Regular"} <= set(regular)
    assert "DejaVu Sans Bold" not in regular
    assert set(regular) | {"DejaVu Sans Bold", "STIXGeneral Italic"} <= set(every)


def test_fonts_of_symbols_and_of_placeholders_are_left_out() -> None:
    found = " ".join(names(FONTS, styles="all"))
    assert not any(name in found for name in ("Last Resort", "cmex10", "cmsy10", "STIXSize", "Display"))


def test_a_font_that_draws_all_glyphs_alike_is_left_out(tmp_path: Path) -> None:
    with TTFont(FONTS / "DejaVuSans.ttf") as font:
        for table in font["cmap"].tables:
            table.cmap = {code: "A" if chr(code).isalpha() else glyph for code, glyph in table.cmap.items()}
        font.save(tmp_path / "alike.ttf")
    assert names(tmp_path, "A") == [SANS] and names(tmp_path, "ABC") == []


def test_fonts_without_a_glyph_are_left_out() -> None:
    assert SANS in names(FONTS, "A\u0434") and "cmr10 Regular" not in names(FONTS, "A\u0434")
    assert names(FONTS, "A\U000e0fff") == []


def test_copies_are_one_font_also_under_another_name(tmp_path: Path) -> None:
    for name in ("b.ttf", "deep/a.ttf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(FONTS / "DejaVuSans.ttf", tmp_path / name)
    assert [font.path.name for font in find_fonts("AB", tmp_path)] == ["b.ttf"]
    renamed(FONTS / "DejaVuSans.ttf", tmp_path / "c.ttf", "Another Sans")
    assert names(tmp_path) == ["Another Sans Book"]


def test_damaged_fonts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(FONTS / "DejaVuSans.ttf", tmp_path)
    path = tmp_path / "damaged.ttf"
    path.write_bytes((FONTS / "DejaVuSans.ttf").read_bytes()[:500])
    with pytest.raises(ValueError, match=f"{path}: must be a font, found a file that cannot be read as one"):
        load_typefaces(folder=tmp_path)
    monkeypatch.setattr("guda_fast.datasets.fonts.standard_folders", lambda: [tmp_path])
    with pytest.warns(UserWarning, match=f"{path}: must be a font"):
        found = find_fonts("AB")
    assert [font.name for font in found] == [SANS]


def test_standard_folders_need_not_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert standard_folders()
    monkeypatch.setattr("guda_fast.datasets.fonts.standard_folders", lambda: [tmp_path / "none"])
    assert find_fonts("A") == []


def test_images_are_sorted_by_font_then_glyph() -> None:
    data = load_typefaces([SANS, SERIF], glyphs="AWi", size=16, repeats=3, folder=FONTS)
    assert data.images.dtype == torch.uint8 and data.images.shape == (18, 1, 16, 16)
    assert {group: index.tolist() for group, index in data.members.items()} == {
        SANS: list(range(9)),
        SERIF: list(range(9, 18)),
    }
    ink = data.images.float().mean(dim=(1, 2, 3)).reshape(2, 3, 3).mean(dim=2)
    assert bool((ink[:, 1] > ink[:, 0]).all()) and bool((ink[:, 0] > ink[:, 2]).all())  # W, then A, then i
    assert len({image.numpy().tobytes() for image in data.images}) == 18


def test_an_image_depends_on_font_glyph_number_and_seed_alone() -> None:
    options = {"size": 16, "folder": FONTS}
    data = load_typefaces([SERIF, SANS], glyphs="WA", repeats=3, **options)
    alone = load_typefaces([SANS], glyphs="WA", repeats=2, **options)
    assert torch.equal(data.images[data.group(SANS)].unflatten(0, (2, 3))[:, :2].flatten(0, 1), alone.images)
    again = load_typefaces([SANS], glyphs="WA", repeats=2, **options)
    other = load_typefaces([SANS], glyphs="WA", repeats=2, seed=1, **options)
    assert torch.equal(again.images, alone.images) and not torch.equal(other.images, alone.images)


def test_glyphs_that_look_alike_are_shifted_on_their_own(tmp_path: Path) -> None:
    renamed(FONTS / "DejaVuSans.ttf", tmp_path / "another.ttf", "Another Sans")
    fonts = [load_typefaces(glyphs="A", size=16, folder=folder) for folder in (tmp_path, FONTS)]
    assert not torch.equal(fonts[0].images, fonts[1].images[fonts[1].group(SANS)])
    data = load_typefaces([SANS], glyphs="A\u0410", size=16, repeats=4, folder=FONTS)  # Latin and Cyrillic
    for latin, cyrillic in zip(data.images[:4], data.images[4:], strict=True):
        assert not torch.equal(latin, cyrillic)


def test_nothing_of_a_glyph_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"glyphs": "AQWj", "size": 32, "repeats": 24, "folder": FONTS}
    shifted = load_typefaces([SANS, SERIF], **options).images.double()
    monkeypatch.setattr("guda_fast.datasets.typefaces._SHIFT", 0.0)
    centred = load_typefaces([SANS, SERIF], **options).images.double()
    border = torch.ones(32, 32, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert bool((centred[..., border] == 0).all())
    # The same drawing elsewhere: each grey value is rounded by at most a half.
    rounding = ((shifted > 0).sum(dim=(1, 2, 3)) + (centred > 0).sum(dim=(1, 2, 3))) / 2
    ink, expected = shifted.sum(dim=(1, 2, 3)), centred.sum(dim=(1, 2, 3))
    assert bool(((ink - expected).abs() <= rounding).all())
    scales = expected.reshape(8, 24)
    assert bool((scales.amin(dim=1) < 0.8 * scales.amax(dim=1)).all())


def test_glyphs_as_conditions() -> None:
    data = load_typefaces([SANS, SERIF], glyphs="ABC", size=16, repeats=2, folder=FONTS)
    assert data.conditions is not None and data.removed is not None and data.null is None
    assert data.conditions.keys == (0, 1, 2)
    assert data.conditions.row.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert data.removed.tolist() == [0, 1, 2]  # a glyph says nothing of its font
    with_null = load_typefaces([SANS], glyphs="ABC", size=16, null=True, folder=FONTS)
    assert with_null.null == 3 and with_null.conditions is not None and with_null.conditions.count == 4
    plain = load_typefaces([SANS], glyphs="ABC", size=16, conditions="none", folder=FONTS)
    assert plain.conditions is None


def test_fonts_and_glyphs_as_conditions() -> None:
    data = load_typefaces(
        [SANS, SERIF], glyphs="ABC", size=16, repeats=2, conditions="font-glyph", null=True, folder=FONTS
    )
    assert data.conditions is not None and data.removed is not None
    assert data.conditions.tensors["class_labels"].tolist() == list(range(2 * 3 + 3 + 1))
    assert data.conditions.row.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert data.removed.tolist() == [6, 7, 8, 6, 7, 8, 6, 7, 8, 9]
    assert data.null == 9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fonts": 99}, ValueError, r"fonts must be at most \d+, those with all glyphs in .*, got 99"),
        ({"fonts": 0}, ValueError, "fonts must be at least 1"),
        ({"fonts": "Arial"}, TypeError, "fonts must be an integer, got 'Arial'"),
        ({"fonts": ["Arial"]}, ValueError, f"fonts must be distinct ones of .*{SANS}, .*, got"),
        ({"fonts": [SANS, SANS]}, ValueError, "fonts must be distinct ones of"),
        ({"fonts": []}, ValueError, "fonts must be distinct ones of"),
        ({"glyphs": ""}, ValueError, "glyphs must be distinct characters that can be seen"),
        ({"glyphs": "AA"}, ValueError, "glyphs must be distinct characters that can be seen"),
        ({"glyphs": "A "}, ValueError, "glyphs must be distinct characters that can be seen"),
        ({"glyphs": "\U000e0fff"}, ValueError, "fonts with all glyphs must be in .*, found none"),
        ({"size": 7}, ValueError, "size must be between 8 and 1024, got 7"),
        ({"repeats": 0}, ValueError, "repeats must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"conditions": "font"}, ValueError, "conditions must be one of 'none', 'glyph', 'font-glyph', got 'font'"),
        ({"styles": "bold"}, ValueError, "styles must be one of 'regular', 'all', got 'bold'"),
        ({"conditions": "none", "null": True}, ValueError, "null must come with conditions"),
        ({"folder": "no such folder"}, FileNotFoundError, "folder must hold fonts, found no folder no such folder"),
    ],
)
def test_errors(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        load_typefaces(**{"folder": FONTS, "glyphs": "AB", "repeats": 1, **arguments})


def test_the_probe_of_missing_glyphs_works_in_these_fonts() -> None:
    """What tells a missing glyph is that it is drawn as U+FFFF is; a font for which that fails would show here."""
    for path in FONTS.glob("DejaVu*.ttf"):
        with TTFont(path) as font:
            has = {chr(code) for code in font.getBestCmap()}
        face = ImageFont.truetype(path, 32, layout_engine=ImageFont.Layout.BASIC)
        for glyph in "A\u0434\u4e00":
            drawn_as_missing = bytes(face.getmask(glyph)) == bytes(face.getmask("\uffff"))
            assert drawn_as_missing == (glyph not in has)
