"""open_dataset: names, folders and choices, and how what is not known is answered."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from guda_fast.datasets import load_digits, load_typefaces, open_dataset

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """paintings/ of two groups, below the working folder."""
    monkeypatch.chdir(tmp_path)
    for group, count in [("cubism", 3), ("sketch", 2)]:
        (tmp_path / "paintings" / group).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((12, 12, 3), 40 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "paintings" / group / f"{number}.png")
    return tmp_path


def test_names_and_their_choices() -> None:
    assert open_dataset("digits").counts() == load_digits().counts()
    data = open_dataset("digits,conditions=labels,null=yes,per_group=4")
    assert data.counts() == dict.fromkeys("0123456789", 4)
    assert data.null == 10 and data.conditions is not None and data.conditions.count == 11
    drawn = open_dataset(f"typefaces,fonts=2,glyphs=ABC,size=16,repeats=2,seed=3,folder={FONTS}")
    expected = load_typefaces(2, glyphs="ABC", size=16, repeats=2, seed=3, folder=FONTS)
    assert drawn.images.equal(expected.images) and drawn.groups == expected.groups
    assert drawn.conditions is not None and drawn.conditions.count == 3
    named = open_dataset(f"typefaces,fonts=cmtt10 Regular+DejaVu Sans Book,size=16,repeats=1,folder={FONTS}")
    assert named.groups == ("cmtt10 Regular", "DejaVu Sans Book")


def test_conditions_of_a_source_or_of_groups() -> None:
    spec = f"typefaces,fonts=2,glyphs=AB,size=16,folder={FONTS},conditions="
    counts = {}
    for kind in ("none", "labels", "glyph", "font-glyph"):
        found = open_dataset(spec + kind).conditions
        counts[kind] = None if found is None else found.count
    assert counts == {"none": None, "labels": 2, "glyph": 2, "font-glyph": 2 * 2 + 2}
    assert open_dataset(f"{spec}font-glyph,null=yes").null == 6


def test_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_dataset("paintings").counts() == {"cubism": 3, "sketch": 2}
    small = open_dataset(f"{folder / 'paintings'},size=8,channels=1,conditions=labels")
    assert small.images.shape == (5, 1, 8, 8) and small.conditions is not None
    monkeypatch.setenv("HOME", str(folder))
    assert len(open_dataset("~/paintings")) == 5
    (folder / "paintings").rename(folder / "digits")
    assert len(open_dataset("digits")) == 1797 and len(open_dataset("./digits")) == 5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "mnist",
            "must begin with one of digits, fashion-mnist, cifar10, typefaces, or a folder of images, got 'mnist'",
        ),
        ("", "must begin with one of digits"),
        ("digits,size=8", "digits takes conditions=, null=, per_group=, got 'size=8'"),
        ("digits,labels", "digits takes conditions=, null=, per_group=, got 'labels'"),
        ("digits,", "digits takes conditions=, null=, per_group=, got ''"),
        (
            "paintings,split=train",
            "paintings takes size=, channels=, text=, conditions=, null=, per_group=, got 'split=train'",
        ),
        ("digits,conditions=glyph", "digits,conditions= must be one of none, labels, got 'glyph'"),
        ("paintings,conditions=glyph", "paintings,conditions= must be one of none, labels, metadata, got 'glyph'"),
        ("digits,null=1", "digits,null= must be yes or no, got '1'"),
        ("digits,null=yes", "null must come with conditions, got 'digits,null=yes'"),
        ("digits,per_group=all", "digits,per_group= must be an integer, got 'all'"),
        ("digits,per_group=0", "per_group must be at least 1, got 0"),
        ("digits,per_group=3,per_group=3", "per_group must be given once"),
        ("cifar10", "cifar10 must come with folder=, got 'cifar10'"),
        ("cifar10,folder=", "cifar10,folder= must be a folder, got ''"),
        ("fashion-mnist,split=val", "fashion-mnist,split= must be one of train, test, all, got 'val'"),
        ("fashion-mnist,size=24", "size must be 28, 32 or 16, got 24"),
    ],
)
def test_what_is_not_known_is_answered_with_the_choices(folder: Path, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(spec)


def test_what_is_no_text_or_not_there() -> None:
    with pytest.raises(TypeError, match="spec must be a text, got"):
        open_dataset(Path("digits"))  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="folder must hold CIFAR-10, found no folder none"):
        open_dataset("cifar10,folder=none")
