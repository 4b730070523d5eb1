"""Queries: ids against a hash written out, every source, duplicates, and files that are not images."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from guda_fast.datasets.queries import load_queries
from guda_fast.diffusion import query_id

PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3


def plain_id(kind: bytes, sizes: tuple[int, ...], data: bytes, condition: bytes = b"none") -> int:
    header = struct.pack(f"<{len(sizes) + 1}q", len(sizes), *sizes)
    return struct.unpack("<Q", hashlib.blake2b(kind + header + data + condition).digest()[:8])[0]


def test_query_id_hashes_these_bytes() -> None:
    values = np.array([[1.5, -2.0]], dtype=np.float32)
    assert query_id(PIXELS) == plain_id(b"image", (8, 8), PIXELS.tobytes())
    assert query_id(values) == plain_id(b"tensor", (1, 2), struct.pack("<2f", 1.5, -2.0))
    assert query_id(PIXELS.T) == plain_id(b"image", (8, 8), PIXELS.T.tobytes())
    for condition, tagged in [("ein Häuschen", "promptein Häuschen".encode()), (7, b"label7"), (b"7", b"values7")]:
        assert query_id(PIXELS, condition) == plain_id(b"image", (8, 8), PIXELS.tobytes(), tagged)
    with pytest.raises(TypeError, match="content must be uint8 pixels or float32 values, got float64"):
        query_id(PIXELS.astype(np.float64))
    with pytest.raises(TypeError, match="condition must be None, a prompt, a class label or a digest"):
        query_id(PIXELS, 1.5)  # type: ignore[arg-type]


def test_every_source_of_the_same_pixels_has_the_same_id_and_values(tmp_path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    sources = [
        tmp_path,
        str(tmp_path),
        [tmp_path / "a.png"],
        [Image.fromarray(PIXELS)],
        PIXELS[None],
        PIXELS[None, ..., None],
    ]
    for source in sources:
        found = load_queries(source, channels=1, size=8)
        assert found.query_ids == (query_id(PIXELS),)
        torch.testing.assert_close(found.x0[0, 0], torch.from_numpy(PIXELS).float() / 127.5 - 1)


def test_folders_are_read_recursively_in_sorted_order(tmp_path) -> None:
    for index, name in enumerate(["b/1.png", "a/2.PNG", "a/10.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(PIXELS + index).save(tmp_path / name)
    (tmp_path / "a" / ".hidden.png").write_text("not read")
    (tmp_path / ".checkpoints").mkdir()
    (tmp_path / ".checkpoints" / "0.png").write_text("not read")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "notes.txt").write_text("not read")
    assert load_queries(tmp_path, channels=1).names == ("a/10.png", "a/2.PNG", "b/1.png")


def test_rgb_grey_and_palette_images_become_what_the_model_takes(tmp_path) -> None:
    colour = np.stack([PIXELS, PIXELS.T, PIXELS], axis=-1)
    picture = Image.fromarray(colour)
    found = load_queries([picture], channels=3)
    assert found.x0.shape == (1, 3, 8, 8)
    torch.testing.assert_close(found.x0[0, 1], torch.from_numpy(PIXELS.T.copy()).float() / 127.5 - 1)
    assert load_queries([picture], channels=1).x0.shape == (1, 1, 8, 8)
    opaque = picture.convert("RGBA")
    assert load_queries([opaque], channels=3).query_ids == found.query_ids
    opaque.putpixel((0, 0), (1, 2, 3, 4))
    palette = Image.fromarray(PIXELS).convert("P")
    palette.info["transparency"] = 0
    for hidden in (opaque, palette):
        with pytest.raises(ValueError, match=r"queries\[0\]: must be an opaque image"):
            load_queries([hidden], channels=3)


def test_duplicates_are_computed_once_and_reported_each() -> None:
    values = torch.randn(2, 1, 4, 4)
    found = load_queries(torch.cat([values, values.flip(0)]), channels=1)
    assert len(found) == 4 and len(found.x0) == 2
    assert found.row.tolist() == [0, 1, 1, 0]
    assert found.names == ("0", "1", "2", "3") and found.distinct_names == ("0", "1")


def test_given_ids_are_used_and_must_not_collide() -> None:
    values = torch.randn(2, 1, 4, 4)
    assert load_queries(values, channels=1, ids=[5, 2**64 - 1]).query_ids == (5, 2**64 - 1)
    with pytest.raises(ValueError, match="ids must differ where contents differ.*both 0 and 1"):
        load_queries(values, channels=1, ids=[5, 5])
    with pytest.raises(ValueError, match=r"ids must hold one id a query \(2\), got 1"):
        load_queries(values, channels=1, ids=[5])


def test_bad_files_are_named(tmp_path) -> None:
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(whole)
    data = whole.read_bytes()
    cases = {
        "text.png": (b"this is no image", "text.png: must be an image, found a file that cannot be read as one"),
        "empty.png": (b"", "empty.png: must be an image"),
        "cut.png": (data[: len(data) // 2], "cut.png: must be a whole image, found a damaged file"),
        "flipped.png": (data[:60] + bytes([data[60] ^ 0xFF]) + data[61:], "flipped.png: must be a whole image"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_queries([whole, tmp_path / name], channels=1)
    with pytest.raises(FileNotFoundError, match=r"names .*missing\.png, found no such file"):
        load_queries([tmp_path / "missing.png"], channels=1)
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png: must be an 8-bit grey or RGB image, found mode I;16"):
        load_queries([tmp_path / "deep.png"], channels=1)


def test_bad_arguments(tmp_path) -> None:
    cases = [
        (tmp_path, {}, ValueError, "at least one query"),
        (tmp_path / "nowhere", {}, FileNotFoundError, "found no folder"),
        (torch.zeros(2, 3, 8, 8), {}, ValueError, "query 0 must have 1 x 8 x 8"),
        (torch.zeros(2, 1, 8, 9), {"size": 8}, ValueError, "query 0 must have 1 x 8 x 8 .* found 1 x 8 x 9"),
        ([Image.fromarray(PIXELS[:4])], {"size": 8}, ValueError, "must have 1 x 8 x 8 .* found 1 x 4 x 8"),
        (torch.full((1, 1, 8, 8), torch.nan), {}, ValueError, "query 0 must be finite"),
        (torch.zeros(1, 1, 8, 8).double(), {}, ValueError, "queries must be float32"),
        (torch.zeros(1, 8, 8), {}, ValueError, "queries must be float32 of shape"),
        ([3], {}, TypeError, r"queries\[0\] must be an image file or a PIL image"),
        (torch.zeros(1, 1, 8, 8).bfloat16(), {}, ValueError, "queries must be float32 or uint8, got bfloat16"),
        (torch.zeros(1, 1, 0, 8), {}, ValueError, "queries must have pixels"),
        (3, {}, TypeError, "queries must be a folder, a tensor, an array or a sequence"),
        ([Image.fromarray(PIXELS)], {"channels": 4}, ValueError, "4 channels takes latents"),
    ]
    for source, options, error, message in cases:
        with pytest.raises(error, match=message):
            load_queries(source, **{"channels": 1, **options})


def test_a_file_name_that_no_result_could_hold_is_refused(tmp_path) -> None:
    path = tmp_path / b"\xff.png".decode("utf-8", "surrogateescape")
    Image.fromarray(PIXELS).save(path)
    with pytest.raises(ValueError, match="file names must be printable UTF-8"):
        load_queries(tmp_path, channels=1)


def test_read_only_arrays_are_taken_without_a_warning() -> None:
    pixels = PIXELS[None].copy()
    pixels.flags.writeable = False
    assert load_queries(pixels, channels=1).query_ids == (query_id(PIXELS),)
