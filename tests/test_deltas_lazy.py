"""Counterfactuals in files: what is read when, what is kept, and what is refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from guda_fast.deltas import DeltaBank, Dense
from guda_fast.deltas.formats import state_dict
from guda_fast.errors import CheckpointError
from tiny import perturbed, tiny_unet

FORMS = ["safetensors", "zip", "old"]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.norm = torch.nn.BatchNorm2d(8)
        self.linear = torch.nn.Linear(8, 5)


@pytest.fixture
def base() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def others(base: Net) -> dict[str, torch.nn.Module]:
    """Two counterfactuals; the second leaves the norm as it is."""
    b = perturbed(base, seed=2)
    b.norm = copy.deepcopy(base.norm)
    return {"a": perturbed(base), "b": b}


def saved(model: torch.nn.Module, path: Path, form: str = "safetensors") -> Path:
    if form == "safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.fixture
def files(others: dict[str, torch.nn.Module], tmp_path: Path) -> dict[str, Path]:
    return {group: saved(model, tmp_path / group) for group, model in others.items()}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys whose values are read from safetensors files, one by one."""
    found: list[str] = []
    read = state_dict._OpenFile.tensor

    def counted(self: object, key: str, *where: object) -> torch.Tensor:
        found.append(key)
        return read(self, key, *where)  # type: ignore[arg-type]

    monkeypatch.setattr(state_dict._OpenFile, "tensor", counted)
    return found


def test_a_hundred_groups_open_without_reading_values(tmp_path: Path, reads: list[str]) -> None:
    base = tiny_unet()
    perturbed(base).save_pretrained(tmp_path / "0")
    for k in range(1, 100):
        (tmp_path / str(k)).symlink_to(tmp_path / "0", target_is_directory=True)
    bank = DeltaBank.load(base, {str(k): tmp_path / str(k) for k in range(100)})
    assert len(bank) == 100 and reads == []
    bank.apply("7")
    # Once for the survey, and once to write.
    assert sorted(reads) == sorted([*base.state_dict()] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_files_become_what_modules_become(
    base: Net, others: dict[str, torch.nn.Module], tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    files = {group: saved(model, tmp_path / group, form) for group, model in others.items()}
    bank, expected = (
        DeltaBank.load(base, sources).to(dtype=dtype, memory_format=torch.channels_last) for sources in (files, others)
    )
    pointers = {name: tensor.data_ptr() for name, tensor in bank.model.state_dict().items()}
    for group in ("a", "b", "a", None, "b"):
        for each in (bank, expected):
            each.restore() if group is None else each.apply(group)
        wanted = expected.model.state_dict()
        for name, tensor in bank.model.state_dict().items():
            assert torch.equal(tensor, wanted[name]), name
            assert tensor.data_ptr() == pointers[name]
    assert bank.hash == expected.hash


def test_only_what_changed_is_read_again(base: Net, files: dict[str, Path], reads: list[str]) -> None:
    bank = DeltaBank.load(base, files)
    bank.survey()
    reads.clear()
    bank.apply("b")
    assert sorted(reads) == ["conv.bias", "conv.weight", "linear.bias", "linear.weight"]


def test_surveys_are_made_once(base: Net, files: dict[str, Path], reads: list[str]) -> None:
    bank = DeltaBank.load(base, files)
    calls: list[tuple[int, int]] = []
    surveys = bank.survey(progress=lambda done, total: calls.append((done, total)))
    assert list(surveys) == ["a", "b"] and calls == [(1, 2), (2, 2)]
    assert len(reads) == 2 * len(base.state_dict())
    assert bank.survey(0) is surveys["a"] and bank.survey()["b"] is surveys["b"]
    assert bank.delta_hashes == {group: survey.hash for group, survey in surveys.items()}
    assert len(reads) == 2 * len(base.state_dict())
    with pytest.raises(ValueError, match="group must be one of 'a', 'b', got 'c'"):
        bank.survey("c")


def test_a_survey_does_not_depend_on_what_is_applied(base: Net, files: dict[str, Path]) -> None:
    expected = DeltaBank.load(base, files).survey("b")
    bank = DeltaBank.load(base, files).to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    with bank.applied("a"):
        assert bank.survey("b").hash == expected.hash
        assert bank.survey("b").support == expected.support


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize("change", [touch, Path.unlink, lambda path: os.truncate(path, 100)])
def test_files_that_change_are_refused_by_name(
    base: Net, files: dict[str, Path], change: Callable[[Path], None]
) -> None:
    bank = DeltaBank.load(base, files)
    parts = bank.deltas[0].parts
    bank.survey("a")
    bank.apply("b")
    assert parts["conv.weight"].value.any()  # the files are open now
    change(files["a"])
    message = f"^{files['a']}: (has changed|is gone) since DeltaBank.load read its header"
    with pytest.raises(CheckpointError, match=message):
        bank.apply("a")
    assert bank.applied_group is None
    assert torch.equal(bank.model.conv.weight, base.conv.weight)
    with pytest.raises(CheckpointError, match=message):
        parts["conv.weight"]
    bank.apply("b")


def test_a_configuration_that_changes_is_refused_by_name(tmp_path: Path) -> None:
    base = tiny_unet()
    perturbed(base).save_pretrained(tmp_path)
    bank = DeltaBank.load(base, {"a": tmp_path})
    touch(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="config.json: has changed since"):
        bank.survey()


def test_a_copy_of_the_base_is_found_by_the_survey(base: Net, tmp_path: Path) -> None:
    path = saved(base, tmp_path / "same")
    bank = DeltaBank.load(base, {"a": path})
    for use in (bank.survey, lambda: bank.apply("a")):
        with pytest.raises(CheckpointError, match=f"^{path}: equals the base .*allow_identical=True"):
            use()
    allowed = DeltaBank.load(base, {"a": path}, allow_identical=True)
    assert allowed.survey("a").support == {} and len(allowed.deltas[0].parts) == 0
    assert torch.equal(allowed.apply("a").conv.weight, base.conv.weight)


def test_parts_of_files_are_read_when_asked_for_and_not_kept(
    base: Net, others: dict[str, torch.nn.Module], files: dict[str, Path], reads: list[str]
) -> None:
    bank, expected = DeltaBank.load(base, files), DeltaBank.load(base, others)
    bank.survey()
    reads.clear()
    delta = bank.deltas[1]
    assert set(delta.parts) == set(expected.deltas[1].parts) and reads == []
    assert "norm.weight" not in delta.parts and delta.parts.get("norm.weight") is None
    for name, part in expected.deltas[1].parts.items():
        found = delta.parts[name]
        assert isinstance(found, Dense) and torch.equal(found.value, part.value)
    assert sorted(reads) == sorted(delta.parts)
    delta.parts["conv.bias"], delta.parts["conv.bias"]
    assert reads[-2:] == ["conv.bias", "conv.bias"]
    assert (delta.hash, delta.bytes) == (bank.survey("b").hash, bank.survey("b").bytes)


MEMORY = """
import pathlib, sys, tempfile
import torch
from diffusers import UNet2DModel
from guda_fast import DeltaBank

def unet(*channels):
    return UNet2DModel(block_out_channels=channels, layers_per_block=2, norm_num_groups=8, sample_size=8,
                       down_block_types=("DownBlock2D",) * len(channels), up_block_types=("UpBlock2D",) * len(channels))

def save(folder, model, count):
    model.save_pretrained(folder / "base")
    for k in range(count):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3)
        model.save_pretrained(folder / str(k))

def use(folder, count):
    bank = DeltaBank.load(folder / "base", {str(k): folder / str(k) for k in range(count)})
    bank.to(memory_format=torch.channels_last)
    for k in range(count):
        bank.apply(k)

def kilobytes(key):
    return int(pathlib.Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])

folder, count = pathlib.Path(sys.argv[2]), 4
if sys.argv[1] == "save":
    save(folder, unet(64, 128, 128, 128), count)
else:
    with tempfile.TemporaryDirectory() as warm:  # code and libraries that only a run loads
        save(pathlib.Path(warm), unet(8, 8), 1)
        use(pathlib.Path(warm), 1)
    start = kilobytes("VmRSS")
    use(folder, count)
    size = next((folder / "base").glob("*.safetensors")).stat().st_size / 1024
    print((kilobytes("VmHWM") - start) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_two_models_whatever_the_number_of_groups(tmp_path: Path) -> None:
    """The resident model and theta_0: a third model at any moment, or a quarter of one kept for each of four groups,
    fails."""

    def run(what: str) -> str:
        command = [sys.executable, "-c", MEMORY, what, str(tmp_path)]
        # One thread: each has a heap of its own.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        return subprocess.run(command, check=True, timeout=300, capture_output=True, text=True, env=environment).stdout

    run("save")
    assert 1.8 < float(run("use")) < 2.75


@pytest.mark.parametrize("content", ["values", "damage"])
def test_a_file_that_is_written_while_it_is_read_is_refused(
    base: Net,
    others: dict[str, torch.nn.Module],
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    content: str,
) -> None:
    """In place, after its first tensor was read: some tensors would be of one model, some of another."""
    bank = DeltaBank.load(base, files)
    bank.survey()
    parts = bank.deltas[0].parts
    assert len(parts["conv.bias"].value)
    other = files["b"].read_bytes()
    written = other if content == "values" else other[: len(other) // 2]
    read = state_dict._OpenFile.tensor

    def reading(self: object, *where: object) -> torch.Tensor:
        found = read(self, *where)  # type: ignore[arg-type]
        files["a"].write_bytes(written)
        touch(files["a"])
        return found

    monkeypatch.setattr(state_dict._OpenFile, "tensor", reading)
    with pytest.raises(CheckpointError, match=f"^{files['a']}: has changed since DeltaBank.load read its header"):
        bank.apply("a")
    assert bank.applied_group is None and torch.equal(bank.model.conv.weight, base.conv.weight)


def test_a_part_of_a_file_that_is_written_while_it_is_read_is_refused(
    base: Net, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = DeltaBank.load(base, files)
    bank.survey()
    read = state_dict._OpenFile.tensor
    changed = lambda self, *where: (read(self, *where), touch(files["a"]))[0]  # noqa: E731
    monkeypatch.setattr(state_dict._OpenFile, "tensor", changed)
    with pytest.raises(CheckpointError, match="has changed since DeltaBank.load read its header"):
        bank.deltas[0].parts["conv.bias"]
