"""Counterfactuals that are formed ahead, with the path of a CUDA device taken on the CPU."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from guda_fast.deltas import DeltaBank
from guda_fast.deltas.resident import ResidentModel
from guda_fast.errors import CheckpointError
from tiny import perturbed, tiny_unet


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return tiny_unet()


@pytest.fixture(scope="module")
def others(base: torch.nn.Module) -> dict[str, torch.nn.Module]:
    b = perturbed(base, seed=2)
    b.conv_in = copy.deepcopy(base.conv_in)
    return {"a": perturbed(base), "b": b}


@pytest.fixture
def files(others: dict[str, torch.nn.Module], tmp_path: Path) -> dict[str, Path]:
    for group, model in others.items():
        safetensors.torch.save_file(model.state_dict(), tmp_path / group)
    return {group: tmp_path / group for group in others}


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guda_fast.deltas.bank.stages", lambda device: True)


def assert_same(bank: DeltaBank, expected: DeltaBank) -> None:
    wanted = expected.model.state_dict()
    for name, tensor in bank.model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.usefixtures("staged")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("from_files", [False, True])
def test_prefetched_models_are_those_that_apply_writes(
    base: torch.nn.Module,
    others: dict[str, torch.nn.Module],
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    from_files: bool,
) -> None:
    bank, expected = (
        DeltaBank.load(base, sources).to(dtype=dtype, memory_format=torch.channels_last)
        for sources in (files if from_files else others, others)
    )
    pointers = {name: tensor.data_ptr() for name, tensor in bank.model.state_dict().items()}
    steps: list[tuple[str | None, str | None]] = [
        ("a", "a"),  # as a run does: the next one, and then that
        ("b", "b"),
        ("b", "a"),  # not what was asked for
        (None, "b"),  # nothing was asked for
        ("a", None),  # the base in between
        (None, "a"),
    ]
    for ahead, group in steps:
        if ahead is not None:
            bank.prefetch(ahead)
        bank.restore() if group is None else bank.apply(group)
        with monkeypatch.context() as on_cpu:
            on_cpu.setattr("guda_fast.deltas.bank.stages", lambda device: False)
            expected.restore() if group is None else expected.apply(group)
        assert bank.applied_group == group
        assert_same(bank, expected)
    assert {name: tensor.data_ptr() for name, tensor in bank.model.state_dict().items()} == pointers
    memory = {name: buffer.data_ptr() for name, buffer in bank._staging._buffers.items()}
    bank.prefetch("b")
    bank.apply("b")
    assert {name: buffer.data_ptr() for name, buffer in bank._staging._buffers.items()} == memory


@pytest.mark.usefixtures("staged")
def test_a_move_starts_anew(base: torch.nn.Module, others: dict[str, torch.nn.Module]) -> None:
    bank, expected = DeltaBank.load(base, others), DeltaBank.load(base, others)
    bank.to(dtype=torch.float16).apply("a")
    bank.prefetch("b")
    bank.to(dtype=torch.float32, memory_format=torch.channels_last).restore()
    for group in ("a", "b"):
        bank.apply(group)
        expected.apply(group)
        assert_same(bank, expected)


@pytest.mark.usefixtures("staged")
def test_what_goes_wrong_ahead_is_raised_by_apply(base: torch.nn.Module, files: dict[str, Path]) -> None:
    bank = DeltaBank.load(base, files)
    bank.survey()
    files["a"].unlink()
    bank.apply("b")
    bank.prefetch("a")
    bank.apply(1)
    with pytest.raises(CheckpointError, match=f"^{files['a']}: is gone since"):
        bank.apply("a")
    assert bank.applied_group is None
    for name, tensor in bank.model.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name])
    bank.prefetch("a")
    assert bank.apply("b") is bank.model  # what failed and nobody wants is dropped


@pytest.mark.usefixtures("staged")
def test_values_are_formed_in_a_thread_and_once(
    base: torch.nn.Module, others: dict[str, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    value: Callable[..., torch.Tensor] = ResidentModel.value

    def noted(*arguments: object) -> torch.Tensor:
        threads.append(threading.get_ident())
        return value(*arguments)

    bank = DeltaBank.load(base, others)
    monkeypatch.setattr(ResidentModel, "value", noted)
    bank.prefetch("a")
    bank.prefetch("a")
    bank.apply("a")
    assert len(threads) == len(bank.survey("a").support)
    assert threading.get_ident() not in threads
    bank.prefetch("a")  # it is there already
    assert bank._staging._next is None
    assert len(threads) == len(bank.survey("a").support)


def test_on_a_cpu_prefetch_does_nothing(base: torch.nn.Module, files: dict[str, Path]) -> None:
    bank = DeltaBank.load(base, files)
    bank.prefetch("a")
    assert bank._staging._next is None and not bank._staging._buffers
    with pytest.raises(ValueError, match="group must be one of 'a', 'b', got 'c'"):
        bank.prefetch("c")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cuda_device(
    base: torch.nn.Module, others: dict[str, torch.nn.Module], files: dict[str, Path], dtype: torch.dtype
) -> None:
    """The same bits as on the CPU, in the same memory, with copies queued while the one before may still be read."""
    how = {"dtype": dtype, "memory_format": torch.channels_last}
    bank, expected = DeltaBank.load(base, files).to("cuda", **how), DeltaBank.load(base, others).to("cpu", **how)
    pointers = {name: tensor.data_ptr() for name, tensor in bank.model.state_dict().items()}
    for _ in range(3):
        for group, following in (("a", "b"), ("b", "a")):
            bank.apply(group)
            bank.prefetch(following)
            expected.apply(group)
            for name, tensor in expected.model.state_dict().items():
                assert torch.equal(bank.model.state_dict()[name].cpu(), tensor), name
    bank.restore()
    expected.restore()
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(bank.model.state_dict()[name].cpu(), tensor), name
    assert {name: tensor.data_ptr() for name, tensor in bank.model.state_dict().items()} == pointers
    assert all(buffer.is_pinned() for buffer in bank._staging._buffers.values())
    assert all(master.is_pinned() for master in bank._resident._masters.values())
