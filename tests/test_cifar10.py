"""CIFAR-10: pickles as Python 2 and 3 write them, folders of images, damaged files, and hostile ones."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guda_fast.datasets import load_cifar10
from guda_fast.datasets.cifar10 import GROUPS

NAMES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
LABELS = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]


def rows(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (10, 3072), dtype=np.uint8)


def python2(data: np.ndarray, labels: list[int]) -> bytes:
    """What Python 2's cPickle and numpy of the time wrote, opcode by opcode."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01"
        + b"".join(b"M" + struct.pack("<H", size) for size in data.shape)
        + b"\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + (b"\x89T" + struct.pack("<i", data.size) + data.tobytes() + b"tb")
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}q\x01(U\x04data" + array + b"U\x06labels" + numbers + b"U\x0bbatch_labelU\x01xu."


def save(folder: Path, protocol: int | None = None) -> None:
    for seed, name in enumerate(NAMES):
        found = {b"data": rows(seed), b"labels": LABELS, b"batch_label": name.encode()}
        content = python2(rows(seed), LABELS) if protocol is None else pickle.dumps(found, protocol)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("protocol", [None, 2, 3, 4, 5], ids=["python2", "2", "3", "4", "5"])
def test_pickles_of_every_protocol_are_read(tmp_path: Path, protocol: int | None) -> None:
    save(tmp_path, protocol)
    data = load_cifar10(tmp_path)
    expected = np.concatenate([rows(seed).reshape(10, 3, 32, 32) for seed in range(5)])
    np.testing.assert_array_equal(data.images.numpy(), expected)
    assert data.groups == GROUPS
    assert data.group("cat").tolist() == [0, 10, 20, 30, 40]
    test = load_cifar10(tmp_path, split="test")
    np.testing.assert_array_equal(test.images.numpy(), rows(5).reshape(10, 3, 32, 32))
    assert len(load_cifar10(tmp_path, split="all")) == 60


class Call:
    """Unpickled by an ordinary unpickler, calls a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_no_code_of_a_pickle_runs(tmp_path: Path, protocol: int) -> None:
    save(tmp_path)
    trace = tmp_path / "trace"
    for hostile in [
        Call(os.mkdir, str(trace)),
        Call(eval, f"__import__('os').mkdir({str(trace)!r})"),
        Call(np.fromfile, str(tmp_path / "test_batch")),
        {b"data": Call(os.mkdir, str(trace)), b"labels": LABELS},
    ]:
        content = pickle.dumps(hostile, protocol)
        (tmp_path / NAMES[2]).write_bytes(content)
        with pytest.raises(ValueError, match=f"{tmp_path / NAMES[2]}: must be a pickle of CIFAR-10's.*it names "):
            load_cifar10(tmp_path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Call(os.mkdir, str(trace)), protocol))  # noqa: S301 (the test itself works)
    assert trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04\x8c\x05numpy\x8c\x12ndarray.__init__.x\x93.", "it names numpy.ndarray.__init__.x"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "it remembers under number 2147483647"),
        (b"\x80\x02P0\n.", "must be a pickle"),
        (b"\x80\x02\x8aP" + b"\x7f" * 80 + b".", "must hold a dictionary, found int"),
        (b"(" * 1000, "must be a pickle"),
        (b"", "must be a pickle"),
        (b"\x1f\x8b\x08\x00 not a pickle", "must be a pickle"),
        (pickle.dumps([1]), "must hold a dictionary, found list"),
        (pickle.dumps({b"labels": LABELS}), "must have data of N x 3072 bytes"),
        (pickle.dumps({b"data": rows(0).tobytes(), b"labels": LABELS}), "must have data of N x 3072 bytes"),
        (pickle.dumps({b"data": rows(0)[:, :3071], b"labels": LABELS}), "must have data of N x 3072 bytes"),
        (pickle.dumps({b"data": rows(0)[:0], b"labels": []}), "must have data of N x 3072 bytes"),
        (pickle.dumps({b"data": rows(0).astype(np.int8), b"labels": LABELS}), "must have data of N x 3072 bytes"),
        (pickle.dumps({b"data": rows(0).T.copy().T, b"labels": LABELS}), "must have data of N x 3072 bytes"),
        (
            pickle.dumps({b"data": rows(0), b"labels": LABELS[:9]}),
            "must have a label for each of its 10 images, found 9",
        ),
        (pickle.dumps({b"data": rows(0), b"labels": [10] * 10}), "must have labels, a list of integers of 0 to 9"),
        (pickle.dumps({b"data": rows(0), b"labels": [True] * 10}), "must have labels, a list of integers of 0 to 9"),
        (pickle.dumps({b"data": rows(0), b"fine_labels": LABELS}), "must have labels, a list of integers of 0 to 9"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    save(tmp_path)
    (tmp_path / NAMES[1]).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path / NAMES[1]}: .*{message}"):
        load_cifar10(tmp_path)


def test_every_cut_is_named(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "test_batch"
    whole = path.read_bytes()
    for length in [*range(250), *range(len(whole) - 100, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{path}: must "):
            load_cifar10(tmp_path, split="test")


def test_a_changed_byte_is_read_or_named(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "test_batch"
    whole = path.read_bytes()
    refused = []
    for place in [*range(250), *range(len(whole) - 60, len(whole))]:
        changed = bytearray(whole)
        changed[place] ^= 0x15
        path.write_bytes(changed)
        try:
            load_cifar10(tmp_path, split="test")
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(str(tmp_path) in message for message in refused)


def test_missing_and_oversized_files(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="must hold data_batch_1, .*, found no data_batch_4"):
        load_cifar10(tmp_path)
    with (tmp_path / "data_batch_4").open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(ValueError, match="data_batch_4: must be a file of CIFAR-10, of at most 67108864 bytes"):
        load_cifar10(tmp_path)
    with pytest.raises(FileNotFoundError, match="found no folder"):
        load_cifar10(tmp_path / "none")
    with pytest.raises(ValueError, match="split must be one of 'train', 'test', 'all'"):
        load_cifar10(tmp_path, split="val")
    (tmp_path / "test_batch").write_bytes(python2(rows(0), [3] * 10))
    with pytest.raises(ValueError, match="must have images of all 10 classes, found none of airplane, automobile"):
        load_cifar10(tmp_path, split="test")


def save_folders(folder: Path, seed: int, groups: tuple[str, ...] = GROUPS, side: int = 32) -> None:
    for group, row in zip(groups, rows(seed), strict=True):
        (folder / group).mkdir(parents=True)
        pixels = row.reshape(3, 32, 32)[:, :side, :side].transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / group / "0.png")


def test_folders_of_images_are_read(tmp_path: Path) -> None:
    save_folders(tmp_path / "train", 0)
    save_folders(tmp_path / "test", 1)
    train, both = load_cifar10(tmp_path), load_cifar10(tmp_path, split="all")
    np.testing.assert_array_equal(train.images.numpy(), rows(0).reshape(10, 3, 32, 32))
    np.testing.assert_array_equal(both.images[10:].numpy(), rows(1).reshape(10, 3, 32, 32))
    assert both.group("deer").tolist() == [4, 14]
    assert torch.equal(load_cifar10(tmp_path / "train").images, train.images)


def test_folders_that_are_not_cifar10s_are_refused(tmp_path: Path) -> None:
    save_folders(tmp_path / "small" / "train", 0, side=31)
    with pytest.raises(ValueError, match=r"must have images of 32 x 32 pixels in 10 folders, found 31 x 31 in 10"):
        load_cifar10(tmp_path / "small")
    with pytest.raises(FileNotFoundError, match="found no folder .*test"):
        load_cifar10(tmp_path / "small", split="test")
    save_folders(tmp_path / "mixed" / "train", 0)
    save_folders(tmp_path / "mixed" / "test", 0, groups=tuple("0123456789"))
    with pytest.raises(ValueError, match="train and test must have the same class folders"):
        load_cifar10(tmp_path / "mixed", split="all")
