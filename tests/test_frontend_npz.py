"""The cache of the base's errors as a file of unknown origin: what is read of it, and what is named."""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import guda_fast as gf
from guda_fast.frontends.base_cache import BaseCache

NAMES = ("image_0000.png", "image_0001.png")
ERRORS = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


@pytest.fixture
def cache(tmp_path: Path) -> BaseCache:
    paths = [f"/images/{name}" for name in NAMES]
    return BaseCache(tmp_path / "cache.npz", NAMES, paths, (10, 20, 30), {"seed": 42, "precision": "fp32"})


def of_the_script() -> dict[str, object]:
    return {
        "kl_base": ERRORS[:, ::-1].astype(np.float32),
        "image_paths": np.array([f"elsewhere/{name}" for name in NAMES]),
        "timesteps": np.array([30, 20, 10]),
        "seed": 42,
    }


def header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """A member that claims to be such an array, and has no byte of it."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def packed(path: Path, members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> None:
    """The script's cache with some members replaced."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for key, value in of_the_script().items():
            stream = io.BytesIO()
            np.save(stream, np.asarray(value))
            file.writestr(f"{key}.npy", members.get(key, stream.getvalue()))


@pytest.mark.parametrize("order", ["C", "F"])
def test_what_is_written_is_read(cache: BaseCache, order: str) -> None:
    cache.write(np.array(ERRORS, order=order))
    errors, is_own = cache.read()
    assert is_own and np.array_equal(errors, ERRORS)
    with np.load(cache.path) as file:
        content = dict(file)
    np.savez(cache.path, **{**content, "kl_base": np.asfortranarray(content["kl_base"])})
    assert np.array_equal(cache.read()[0], ERRORS)


@pytest.mark.parametrize("config", [None, {"skip": 10}, "no JSON", "[" * 5000])
def test_a_file_that_does_not_say_what_it_is_of_is_not_own(cache: BaseCache, config: object) -> None:
    np.savez(cache.path, **of_the_script(), **({} if config is None else {"config": np.array(config)}))
    errors, is_own = cache.read()
    assert not is_own and np.array_equal(errors, ERRORS)


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_a_scripts_file_is_refused_below_fp32(cache: BaseCache, precision: str) -> None:
    np.savez(cache.path, **of_the_script())
    narrow = BaseCache(cache.path, NAMES, cache.paths, cache.timesteps, {"seed": 42, "precision": precision})
    with pytest.raises(gf.CheckpointError, match=f"cache.npz: must be a cache of {precision}, found one that says not"):
        narrow.read()
    narrow.write(ERRORS)
    assert narrow.read()[1]


@pytest.mark.parametrize(
    ("key", "member", "message"),
    [
        ("kl_base", header("<f4", (10**7, 10**7)), r"must have shape \(2, 3\) and kind f, found float32 of shape \(1"),
        ("kl_base", header("<f4", (2, 3)), "must be a whole array, found other than the 24 bytes of its header"),
        ("kl_base", header("<f4", (2, 3)) + bytes(25), "must be a whole array, found other than the 24 bytes"),
        ("kl_base", header("|V2000000000", (2, 3)), r"must have shape \(2, 3\) and kind f, found \|V2000000000"),
        ("image_paths", header("<U400000000", (2,)), "must have .* of 4096 characters at most, found <U400000000"),
        ("timesteps", header("<i8", (10**12,)), r"must have shape \(3,\) and kind i or u"),
        ("seed", b"\x93NUMPY\x09\x00" + bytes(100), r"must be a whole array, found version \(9, 0\)"),
        ("seed", b"\x93NUMPY\x01\x00\xff\xff" + b"[" * 65535, "must be a whole array, found Header info length"),
        ("seed", b"", "must be a whole array, found EOF"),
    ],
)  # fmt: skip
def test_a_header_is_compared_before_anything_is_read(cache: BaseCache, key: str, member: bytes, message: str) -> None:
    packed(cache.path, {key: member})
    with pytest.raises(gf.CheckpointError, match=f"cache.npz: key '{key}' {message}"):
        cache.read()


@pytest.mark.parametrize("claimed", [(2, 3), (2**13, 2**13)])
def test_a_bomb_is_not_held_in_memory(cache: BaseCache, claimed: tuple[int, ...]) -> None:
    packed(cache.path, {"kl_base": header("<f4", claimed) + bytes(2**28)})
    assert cache.path.stat().st_size < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(gf.CheckpointError, match="cache.npz: key 'kl_base' must"):
            cache.read()
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_other_compressions_and_encryption_are_named(cache: BaseCache) -> None:
    packed(cache.path, {}, zipfile.ZIP_LZMA)
    with pytest.raises(gf.CheckpointError, match="key 'timesteps' must be a whole array, found compression 14"):
        cache.read()
    packed(cache.path, {}, zipfile.ZIP_STORED)
    content = bytearray(cache.path.read_bytes())
    # The flags of each member, in its own header and in the directory.
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(signature)
        while place >= 0:
            content[place + offset] |= 1
            place = content.find(signature, place + 4)
    cache.path.write_bytes(content)
    with pytest.raises(gf.CheckpointError, match="key 'timesteps' must be a whole array, found .* is encrypted"):
        cache.read()


def test_damage_anywhere_is_an_error_of_ours_or_seen_in_no_value(cache: BaseCache) -> None:
    np.savez_compressed(cache.path, **of_the_script(), config=np.array(json.dumps({"writer": "script"})))
    whole = cache.path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for place in random.integers(0, len(whole), 300).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= int(random.integers(1, 256))
        cache.path.write_bytes(damaged)
        try:
            errors, _ = cache.read()
        except gf.CheckpointError:
            refused += 1
        else:
            assert np.array_equal(errors, ERRORS)
    assert refused > 100


def test_what_is_wrong_is_named(cache: BaseCache) -> None:
    content = of_the_script()
    for key, value, message in (
        ("kl_base", ERRORS * np.nan, "key 'kl_base' must be finite"),
        ("kl_base", ERRORS[:, 1:], r"key 'kl_base' must have shape \(2, 3\) and kind f, found float64 of shape \(2, 2"),
        ("image_paths", np.array(NAMES[::-1]), "key 'image_paths' must name .*; noise depends on which images share"),
        ("image_paths", np.array([{}, {}]), r"key 'image_paths' must have shape \(2,\) and kind U, found object"),
        ("timesteps", np.array([30, 20, 11]), r"key 'timesteps' must be \[30, 20, 10\], found \[30, 20, 11\]"),
        ("seed", np.zeros(2), r"key 'seed' must have shape \(\) and kind i or u, found float64"),
        ("seed", 41, "key 'seed' must be 42, found 41"),
    ):
        np.savez(cache.path, **{**content, key: value})
        with pytest.raises(gf.CheckpointError, match=f"cache.npz: {message}"):
            cache.read()
    np.savez(cache.path, **{key: value for key, value in content.items() if key != "seed"})
    with pytest.raises(gf.CheckpointError, match="key 'seed' must be there, found kl_base, image_paths"):
        cache.read()
    whole = cache.path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no zip"):
        cache.path.write_bytes(damaged)
        with pytest.raises(gf.CheckpointError, match="cache.npz: must be a whole .npz file, found a damaged one"):
            cache.read()
