"""Fashion-MNIST: small IDX files, their three sizes against plain loops, and damaged ones."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from guda_fast.datasets import load_fashion_mnist
from guda_fast.datasets.fashion_mnist import DEBIAN_FOLDER, GROUPS

TRAIN, TEST = 20, 10


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def idx(values: np.ndarray, kind: int = 8) -> bytes:
    return bytes((0, 0, kind, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def save(folder: Path, name: str, content: bytes, compress: bool = True) -> Path:
    path = folder / (f"{name}.gz" if compress else name)
    path.write_bytes(gzip.compress(content) if compress else content)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of each label to train, one to test."""
    for name, count, seed in [("train", TRAIN, 0), ("t10k", TEST, 1)]:
        save(tmp_path, f"{name}-images-idx3-ubyte", idx(pixels(count, seed)))
        save(tmp_path, f"{name}-labels-idx1-ubyte", idx(np.arange(count, dtype=np.uint8) % 10))
    return tmp_path


def test_images_are_those_of_the_files_grouped_by_label(folder: Path) -> None:
    data = load_fashion_mnist(folder)
    np.testing.assert_array_equal(data.images[:, 0].numpy(), pixels(TRAIN, 0))
    assert data.groups == GROUPS
    assert data.group("bag").tolist() == [8, 18]
    both = load_fashion_mnist(folder, split="all")
    np.testing.assert_array_equal(both.images[TRAIN:, 0].numpy(), pixels(TEST, 1))
    np.testing.assert_array_equal(load_fashion_mnist(folder, split="test").images, both.images[TRAIN:])


def test_plain_files_are_read_as_well(folder: Path) -> None:
    expected = load_fashion_mnist(folder).images
    for path in [*folder.glob("train-*.gz")]:
        save(folder, path.stem, gzip.decompress(path.read_bytes()), compress=False)
        path.unlink()
    assert torch.equal(load_fashion_mnist(folder).images, expected)


def test_sizes_are_padded_and_averaged(folder: Path) -> None:
    large, small = (load_fashion_mnist(folder, size=size).images for size in (32, 16))
    assert large.dtype == small.dtype == torch.uint8 and large.shape == (TRAIN, 1, 32, 32)
    for image, padded, averaged in zip(pixels(TRAIN, 0).tolist(), large[:, 0], small[:, 0], strict=True):
        plain = [[0] * 32 for _ in range(32)]
        for i in range(28):
            plain[i + 2][2:30] = image[i]
        assert padded.tolist() == plain
        squares = [
            [sum(plain[2 * i + di][2 * j + dj] for di in (0, 1) for dj in (0, 1)) for j in range(16)] for i in range(16)
        ]
        # Half up: of a sum of four, two and three quarters count as one more.
        assert averaged.tolist() == [[total // 4 + (total % 4 >= 2) for total in row] for row in squares]


def images(content: bytes) -> tuple[str, bytes]:
    return "train-images-idx3-ubyte", content


def labels(content: bytes) -> tuple[str, bytes]:
    return "train-labels-idx1-ubyte", content


NUMBERS = np.arange(TRAIN, dtype=np.uint8) % 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (*images(b""), "must be an IDX file of bytes in 3 dimensions, found one that begins with nothing"),
        (*images(b"\x89PNG" + bytes(99)), "found one that begins with 89 50 4e 47"),
        (*images(idx(pixels(TRAIN, 0), kind=13)), "found one that begins with 00 00 0d 03"),
        (*images(idx(NUMBERS)), "must be an IDX file of bytes in 3 dimensions, found one that begins with 00 00 08 01"),
        (*images(idx(pixels(TRAIN, 0)[:, :, :27])), "must be of 1 to 60000 x 28 x 28, found 20 x 28 x 27"),
        (*images(idx(pixels(0, 0))), "must be of 1 to 60000 x 28 x 28, found 0 x 28 x 28"),
        (*images(bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**32 - 1, 28, 28)), "found 4294967295 x 28 x 28"),
        (*images(idx(pixels(TRAIN, 0))[:-1]), "must have 15680 bytes after its header, found 15679"),
        (*images(idx(pixels(TRAIN, 0)) + b"0"), "must have 15680 bytes after its header, found more"),
        (*labels(idx(NUMBERS[:-1])), "must have a label for each of the 20 images in train-images.*, found 19"),
        (*labels(idx(NUMBERS + 1)), "must have labels of 0 to 9, found 10"),
        (*labels(idx(NUMBERS % 9)), "must have images of all 10 labels, found none of ankle-boot"),
    ],
)
def test_damaged_files_are_named(folder: Path, name: str, content: bytes, message: str) -> None:
    save(folder, name, content)
    with pytest.raises(ValueError, match=f"{folder}.*: .*{message}"):
        load_fashion_mnist(folder)


def test_damaged_gzip_is_named(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    wrong_sum = bytearray(whole)
    wrong_sum[-6] ^= 1
    no_block = bytearray(whole)
    no_block[10] = 0xFF  # the first block's type, of which there are three
    for content in [
        no_block,
        whole[: len(whole) // 2],
        whole[:-4],
        whole[:7],
        gzip.decompress(whole),
        flipped,
        wrong_sum,
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}: must be"):
            load_fashion_mnist(folder)


def test_missing_files_and_other_choices(folder: Path, tmp_path: Path) -> None:
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold train-labels-idx1-ubyte.gz or train-labels-idx1-ubyte"):
        load_fashion_mnist(folder)
    with pytest.raises(FileNotFoundError, match="found no folder"):
        load_fashion_mnist(tmp_path / "none")
    with pytest.raises(ValueError, match="size must be 28, 32 or 16, got 24"):
        load_fashion_mnist(folder, size=24)
    with pytest.raises(ValueError, match="split must be one of 'train', 'test', 'all', got 'val'"):
        load_fashion_mnist(folder, split="val")


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_debians_files_are_the_whole_set() -> None:
    assert load_fashion_mnist(size=16).counts() == dict.fromkeys(GROUPS, 6000)
    assert load_fashion_mnist(split="test").counts() == dict.fromkeys(GROUPS, 1000)
