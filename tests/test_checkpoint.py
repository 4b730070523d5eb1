"""Checkpoint files: what is written is read again; what is damaged or of something else is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from guda_fast.counterfactuals import checkpoint as module
from guda_fast.counterfactuals.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from guda_fast.errors import CheckpointError

SETTINGS = {"lr": 1e-3, "trained": ["a", "b"]}


def written(path: Path) -> Checkpoint:
    tensors = {
        "float": torch.randn(3, 4).t(),
        "double": torch.tensor(1 / 3, dtype=torch.float64),
        "bytes": torch.randint(256, (7,), dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    found = Checkpoint(tensors, {"step": 3, "seconds": 1 / 3, "stopped": None, "scaler": {"scale": 65536.0}})
    write_checkpoint(path, found, SETTINGS)
    return found


def test_everything_comes_back_in_memory_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    expected = written(path)
    found = read_checkpoint(path, SETTINGS)
    assert found is not None and found.values == expected.values and found.tensors.keys() == expected.tensors.keys()
    for name, value in expected.tensors.items():
        assert found.tensors[name].dtype == value.dtype and torch.equal(found.tensors[name], value)
    content = path.read_bytes()
    found.tensors["float"].zero_()
    assert path.read_bytes() == content


def test_no_file_is_no_checkpoint(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path / "checkpoint.safetensors", SETTINGS) is None


def test_a_file_that_is_cut_off_anywhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    written(path)
    content = path.read_bytes()
    for size in (0, 4, 20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="checkpoint.safetensors: must be the checkpoint of a run, found a"):
            read_checkpoint(path, SETTINGS)


def test_a_changed_byte_of_any_tensor_is_found(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    written(path)
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for place in range(begin, len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="found other values|damaged"):
            read_checkpoint(path, SETTINGS)


def test_other_safetensors_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    for metadata in (None, {}, {module._KEY: "[]"}, {module._KEY: "{}"}, {module._KEY: "{"}):
        safetensors.torch.save_file({"weight": torch.zeros(2)}, path, metadata)
        with pytest.raises(CheckpointError, match="must be the checkpoint of a run, found a damaged file"):
            read_checkpoint(path, SETTINGS)


def test_another_runs_checkpoint_says_in_what_it_differs(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    written(path)
    with pytest.raises(CheckpointError, match=r"found another \(lr: wanted 0.5 \(float\), found 0.001 \(float\)\)"):
        read_checkpoint(path, {**SETTINGS, "lr": 0.5})
    with pytest.raises(CheckpointError, match="seed: wanted 1"):
        read_checkpoint(path, {**SETTINGS, "seed": 1})


def test_what_differs_in_a_long_identity_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    about = {"a": "x" * 200, "options": {"weight": 0.3}}
    write_checkpoint(path, Checkpoint({}, {}), {"identity": json.dumps(about)})
    about["options"] = {"weight": 0.5}
    message = r"found another \(identity.options.weight: wanted 0.5 \(float\), found 0.3 \(float\)\)"
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path, {"identity": json.dumps(about)})
    with pytest.raises(CheckpointError, match=r"identity.a: 'x+.*, and another"):  # the same as far as it is shown
        read_checkpoint(path, {"identity": json.dumps({"a": "x" * 200 + "y", "options": {"weight": 0.3}})})


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    expected = written(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("guda_fast._files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, Checkpoint({}, {}), SETTINGS)
    found = read_checkpoint(path, SETTINGS)
    assert found is not None and torch.equal(found.tensors["float"], expected.tensors["float"])
    assert list(tmp_path.iterdir()) == [path]
