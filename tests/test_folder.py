"""Image folders: groups, sizes, metadata, prompts through a tiny text encoder, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import guda_fast as gf
from conditional import tiny_text_encoder, tiny_tokenizer
from guda_fast.datasets import load_folder

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
NAMES = ("cat/a.png", "cat/deep/b.PNG", "dog/c.png", "loose.png")


def save(folder: Path, name: str, pixels: np.ndarray = GREY) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cats, a dog, and an image of no group, each another picture."""
    for number, name in enumerate(NAMES):
        save(tmp_path, name, GREY + number)
    return tmp_path


def describe(folder: Path, *lines: dict[str, object]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def text_encoder() -> gf.TextEncoder:
    return gf.TextEncoder(tiny_text_encoder(), tiny_tokenizer())


def test_groups_are_sub_folders(folder: Path) -> None:
    save(folder, ".cache/x.png")
    (folder / "notes").mkdir()
    (folder / "notes" / ".keep").touch()
    (folder / "notes").rename(folder / ".notes")
    data = load_folder(folder)
    assert data.images.dtype == torch.uint8
    np.testing.assert_array_equal(data.images[:, 0].numpy(), [GREY, GREY + 1, GREY + 2, GREY + 3])
    assert {group: index.tolist() for group, index in data.members.items()} == {"cat": [0, 1], "dog": [2]}
    assert data.conditions is None


def test_colour_is_kept_where_there_is_some(folder: Path) -> None:
    colour = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)
    save(folder, "dog/d.png", colour)
    data = load_folder(folder)
    assert data.images.shape == (5, 3, 8, 8)
    np.testing.assert_array_equal(data.images[3].numpy(), colour.transpose(2, 0, 1))
    np.testing.assert_array_equal(data.images[0].numpy(), np.stack([GREY] * 3))
    assert load_folder(folder, channels=1).images.shape == (5, 1, 8, 8)


def test_other_sizes_are_refused_or_covered_and_cropped(folder: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (20, 32), dtype=np.uint8)
    path = save(folder, "dog/wide.png", wide)
    with pytest.raises(ValueError, match=f"{path}: must have 8 x 8 pixels as cat/a.png, found 32 x 20; give a size"):
        load_folder(folder)
    data = load_folder(folder, size=10)
    expected = ImageOps.fit(Image.fromarray(wide), (10, 10), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(data.images[3, 0].numpy(), np.asarray(expected))
    assert data.images.shape == (5, 1, 10, 10)
    # What has the size already is not touched.
    np.testing.assert_array_equal(load_folder(folder, size=8).images[0, 0].numpy(), GREY)


def test_groups_of_the_metadata_overlap_with_folders(folder: Path) -> None:
    describe(folder, {"file_name": NAMES[0], "groups": ["pet", "dog"]}, {"file_name": NAMES[3], "groups": ["pet"]})
    data = load_folder(folder)
    assert {group: index.tolist() for group, index in data.members.items()} == {
        "cat": [0, 1],
        "dog": [0, 2],
        "pet": [0, 3],
    }


def test_labels_are_conditions(folder: Path) -> None:
    describe(folder, *({"file_name": name, "label": label} for name, label in zip(NAMES, [3, 0, 3, 1], strict=True)))
    data = load_folder(folder, conditions="metadata", null=True)
    assert data.conditions is not None and data.null == 4
    assert data.conditions.row.tolist() == [3, 0, 3, 1]
    assert data.conditions.tensors["class_labels"].tolist() == [0, 1, 2, 3, 4]
    assert load_folder(folder).conditions is None


def test_prompts_are_embedded_with_what_is_left_of_them(folder: Path) -> None:
    prompts = ["a cat ink", "a cat oil", "a dog ink", "a dog"]
    removed = ["a cat", "a cat", "a dog", None]
    describe(
        folder,
        *({"file_name": n, "prompt": p, "removed": r} for n, p, r in zip(NAMES, prompts, removed, strict=True)),
    )
    text = text_encoder()
    data = load_folder(folder, conditions="metadata", text=text)
    conditions = data.conditions
    assert conditions is not None and conditions.keys is not None and data.removed is not None
    assert [conditions.keys[row] for row in conditions.row.tolist()] == prompts
    left = {key: conditions.keys[row] for key, row in zip(conditions.keys, data.removed.tolist(), strict=True)}
    assert left == {
        "a cat ink": "a cat",
        "a cat oil": "a cat",
        "a dog ink": "a dog",
        **{prompt: prompt for prompt in ("a dog", "a cat", "")},
    }
    assert data.null is not None and conditions.keys[data.null] == ""
    embedded = conditions.tensors["encoder_hidden_states"]
    expected = text(["a dog ink"]).tensors["encoder_hidden_states"]
    assert torch.equal(embedded[conditions.row[2]], expected[0])


def test_prompts_need_a_text_encoder(folder: Path) -> None:
    describe(folder, *({"file_name": name, "prompt": "a cat"} for name in NAMES))
    with pytest.raises(ValueError, match="text must be a pipeline's folder to embed the prompts of .*, got None"):
        load_folder(folder, conditions="metadata")
    assert load_folder(folder, conditions="metadata", text=text_encoder()).removed is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["[]"], "metadata.jsonl, line 1: must hold a JSON object, found list"),
        (["{"], "metadata.jsonl, line 1: must be JSON in UTF-8"),
        (['{"label": 1}'], "line 1: must have file_name, an image below .*, found None"),
        (['{"file_name": "cat/none.png"}'], "line 1: must have file_name, an image below .*, found 'cat/none.png'"),
        (['{"file_name": "cat/a.png"}'] * 2, "line 2: must be the only line for cat/a.png, found another"),
        (['{"file_name": "cat/a.png", "label": true}'], "must have label, an integer in .0..65535., found True"),
        (['{"file_name": "cat/a.png", "label": -1}'], "line 1: must have label, an integer in .0..65535., found -1"),
        (['{"file_name": "cat/a.png", "label": 65536}'], "an integer in .0..65535., found 65536"),
        (['{"file_name": "cat/a.png", "prompt": 1}'], "line 1: must have prompt, a text, found 1"),
        (['{"file_name": "cat/a.png", "removed": []}'], r"line 1: must have removed, a text, found \[\]"),
        (['{"file_name": "cat/a.png", "groups": "pet"}'], "line 1: must have groups, a list of names, found 'pet'"),
        (['{"file_name": "cat/a.png", "groups": [""]}'], "line 1: must have groups, a list of names"),
        (['{"file_name": "cat/a.png", "label": 1, "prompt": "x"}'], "must have a label or a prompt, found both"),
        (['{"file_name": "cat/a.png", "label": 1}'], "each image, or a label, found none for cat/deep/b.PNG"),
        ([], "must have a prompt for each image, or a label, found none for cat/a.png"),
        (
            [f'{{"file_name": "{name}", "{kind}": {value}}}' for name, kind, value in zip(
                NAMES, ["label", "label", "prompt", "prompt"], ["1", "2", '"x"', '"y"'], strict=True)],
            "must have a prompt for each image, or a label, found both",
        ),
        (
            [f'{{"file_name": "{name}", "prompt": "x", "removed": "{removed}"}}' for name, removed in zip(
                NAMES, "yyzy", strict=True)],
            "must have one removed for each prompt, found 'y' and 'z' for 'x'",
        ),
    ],
)  # fmt: skip
def test_damaged_metadata_are_named(folder: Path, lines: list[str], message: str) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        load_folder(folder, conditions="metadata", text=text_encoder())


def test_folders_that_hold_no_groups_or_empty_ones(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="folder must be a folder of images, found no folder"):
        load_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=f"{tmp_path}: must hold images, found none"):
        load_folder(tmp_path)
    save(tmp_path, "loose.png")
    with pytest.raises(ValueError, match="must have a sub-folder of images for each group, found images alone"):
        load_folder(tmp_path)
    save(tmp_path, "cat/a.png")
    (tmp_path / "eel").mkdir()
    with pytest.raises(ValueError, match="every group must have images, found none in eel"):
        load_folder(tmp_path)


def test_damaged_images_are_named(folder: Path) -> None:
    path = folder / "dog" / "d.png"
    path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=f"{path}: must be an image, found a file that cannot be read as one"):
        load_folder(folder)
    whole = (folder / "dog" / "c.png").read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=f"{path}: must be a whole image, found a damaged file"):
        load_folder(folder)
    save(folder, "dog/d.png", np.full((8, 8, 4), 100, dtype=np.uint8))
    with pytest.raises(ValueError, match=f"{path}: must be an opaque image"):
        load_folder(folder)


def test_other_choices_are_refused(folder: Path) -> None:
    for options, message in [
        ({"size": 0}, "size must be at least 1"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"conditions": "labels"}, "conditions must be one of 'none', 'metadata', got 'labels'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_folder(folder, **options)
