"""State dicts, in files and in memory: where the model may be in them, and what is wrong with bad ones."""

from __future__ import annotations

import argparse
import copy
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from guda_fast.deltas import DeltaBank
from guda_fast.errors import CheckpointError

State = dict[str, torch.Tensor]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = torch.nn.Conv2d(1, 8, 3)
        self.norm = torch.nn.GroupNorm(2, 8)
        self.conv_out = torch.nn.Conv2d(8, 1, 3)


@pytest.fixture
def base() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def state() -> State:
    """The state dict of a counterfactual in which the convolutions differ."""
    torch.manual_seed(1)
    return {name: tensor.clone() for name, tensor in Net().state_dict().items()}


@pytest.fixture
def expected(base: Net, state: State) -> DeltaBank:
    """The bank from memory, which test_deltas.py checks against arithmetic."""
    return DeltaBank.load(base, {"g": state})


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("container", [None, "unet_state_dict", "model_state_dict", "state_dict", "unet"])
def test_state_dicts(
    base: Net,
    state: State,
    expected: DeltaBank,
    tmp_path: Path,
    container: str | None,
    prefix: str,
) -> None:
    state = {prefix + name: tensor for name, tensor in state.items()}
    content = state if container is None else {container: state, "optimizer_state_dict": {"lr": 0.1}, "step": 7}
    torch.save(content, tmp_path / "zip.pt")
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save(content, tmp_path / "named_wrongly.safetensors")
    flat = {f"{container}.{name}" if container else name: tensor for name, tensor in state.items()}
    safetensors.torch.save_file(flat, tmp_path / "flat.safetensors")
    safetensors.torch.save_file(flat, tmp_path / "named_wrongly.bin")
    bank = DeltaBank.load(base, {"memory": content, **{path.name: path for path in tmp_path.iterdir()}})
    assert len(bank) == 6
    assert set(bank.delta_hashes.values()) == set(expected.delta_hashes.values())


def spoil_shape(state: State) -> None:
    state["conv_in.weight"] = state["conv_in.weight"].repeat(1, 3, 1, 1)


def spoil_shapes(state: State) -> None:
    spoil_shape(state)
    state["conv_in.bias"] = state["conv_in.bias"][:4].clone()
    state["conv_out.bias"] = state["conv_out.bias"].repeat(2)


def spoil_missing(state: State) -> None:
    del state["conv_in.weight"], state["conv_in.bias"]


def spoil_unknown(state: State) -> None:
    state["conv_in.alpha"] = torch.ones(1)


def spoil_renamed(state: State) -> None:
    state["conv_out.w"] = state.pop("conv_out.weight")


def spoil_nan(state: State) -> None:
    state["conv_in.weight"][3, 0, 1, 2] = float("nan")


def spoil_infinite(state: State) -> None:
    state["conv_in.bias"][2:4] = -float("inf")


def spoil_dtype(state: State) -> None:
    state["conv_in.bias"] = state["conv_in.bias"].to(torch.int32)


BAD_STATES: list[tuple[Callable[[State], None], str]] = [
    (
        spoil_shape,
        r"key 'conv_in.weight' must have shape \(8, 1, 3, 3\) as in the base, found \(8, 3, 3, 3\)$",
    ),
    (
        spoil_shapes,
        r"key 'conv_in.weight' must have shape \(8, 1, 3, 3\) .*\(8, 3, 3, 3\) \(and 2 more keys\)$",
    ),
    (
        spoil_missing,
        r"key 'conv_in.weight' is missing \(and 1 more key\); pass Source\(..., format=\"partial\"\), .*if the rest",
    ),
    (spoil_unknown, r"key 'conv_in.alpha' is not in the base$"),
    (spoil_renamed, r"key 'conv_out.weight' is missing; key 'conv_out.w' is not in the base$"),
    (
        spoil_nan,
        r"key 'conv_in.weight' must be finite, found 1 NaN or infinite of 72 values.* at \(3, 0, 1, 2\)$",
    ),
    (spoil_infinite, r"key 'conv_in.bias' must be finite, found 2 NaN or infinite of 8 values.* at \(2,\)$"),
    (spoil_dtype, r"key 'conv_in.bias' must be float32 or float64 or bfloat16 or float16, found int32$"),
]


@pytest.mark.parametrize("form", ["safetensors", "pt", "memory"])
@pytest.mark.parametrize(("spoil", "message"), BAD_STATES)
def test_bad_keys_are_named_with_their_file(
    base: Net,
    state: State,
    tmp_path: Path,
    spoil: Callable[[State], None],
    message: str,
    form: str,
) -> None:
    spoil(state)
    source: object = tmp_path / f"model.{form}"
    origin = str(source)
    if form == "memory":
        source, origin = state, r"counterfactuals\['g'\]"
    elif form == "pt":
        torch.save(state, source)
    else:
        safetensors.torch.save_file(state, source)
    if form != "memory" and spoil in (spoil_nan, spoil_infinite):
        bank = DeltaBank.load(base, {"g": source})
        for use in (bank.survey, lambda: bank.apply("g")):
            with pytest.raises(CheckpointError, match=f"^{origin}: {message}"):
                use()
        assert bank.applied_group is None
        return
    with pytest.raises(CheckpointError, match=f"^{origin}: {message}"):
        DeltaBank.load(base, {"g": source})


def test_difference_that_overflows(base: Net, state: State) -> None:
    huge = copy.deepcopy(base)
    with torch.no_grad():
        huge.conv_in.bias.fill_(-3.0e38)
    state["conv_in.bias"].fill_(3.0e38)
    with pytest.raises(CheckpointError, match="key 'conv_in.bias' differs from the base by more than float32 can"):
        DeltaBank.load(huge, {"g": state})


def test_tensors_without_plain_values(base: Net, state: State) -> None:
    for bad, found in [
        (torch.empty(8, device="meta"), "one on the meta device"),
        (torch.ones(8).to_sparse(), "one with layout torch.sparse_coo"),
    ]:
        with pytest.raises(CheckpointError, match=f"'conv_in.bias' must be a dense tensor with values, found {found}"):
            DeltaBank.load(base, {"g": {**state, "conv_in.bias": bad}})
    with pytest.raises(CheckpointError, match="'conv_in.bias' must be a tensor, found list"):
        DeltaBank.load(base, {"g": {**state, "conv_in.bias": [1.0]}})
    with pytest.raises(CheckpointError, match="keys must be strings, found 3"):
        DeltaBank.load(base, {"g": {**state, 3: torch.ones(8)}})


def header_longer(data: bytes) -> bytes:
    return (1 << 40).to_bytes(8, "little") + data[8:]


def header_shorter(data: bytes) -> bytes:
    return (int.from_bytes(data[:8], "little") - 8).to_bytes(8, "little") + data[8:]


def header_flipped(data: bytes) -> bytes:
    return data[:8][::-1] + data[8:]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "4 bytes": lambda data: data[:4],
    "100 bytes": lambda data: data[:100],
    "half": lambda data: data[: len(data) // 2],
    "last byte": lambda data: data[:-1],
    "text": lambda data: b"<html>404 Not Found</html>",
    "pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
}


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(base: Net, state: State, tmp_path: Path, damage: str, form: str) -> None:
    path = tmp_path / "model.bin"
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    what = {
        "empty": "the file is empty",
        "text": "neither a safetensors",
        "pointer": "this is a Git LFS pointer",
    }
    message = what.get(damage, "damaged or truncated|neither a safetensors file nor a torch checkpoint, or cut off")
    with pytest.raises(CheckpointError, match=f"^{path}: ({message})"):
        DeltaBank.load(base, {"g": path})


@pytest.mark.parametrize("damage", [header_longer, header_shorter, header_flipped])
def test_wrong_header_lengths(base: Net, state: State, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(safetensors.torch.save(state)))
    with pytest.raises(CheckpointError, match=f"^{path}: damaged or truncated safetensors file"):
        DeltaBank.load(base, {"g": path})


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_never_run_code(base: Net, state: State, tmp_path: Path, zipped: bool) -> None:
    path, canary = tmp_path / "model.pt", tmp_path / "ran"
    torch.save({"state_dict": state, "x": Canary(canary)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=f"^{path}: holds more than tensors.*mkdir.*safetensors.torch.save_file"):
        DeltaBank.load(base, {"g": path})
    assert not canary.exists()
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"holds more than tensors and plain containers \(argparse.Namespace\)"):
        DeltaBank.load(base, {"g": path})


def test_files_without_a_state_dict(base: Net, state: State, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for content, message in [
        ([torch.ones(2)], "must hold a state dict, found list"),
        (
            {"generator": state, "step": 3},
            "must hold tensors by name, at the top or under .*; found 'generator', 'step'",
        ),
        ({}, "must hold tensors by name.*; found nothing"),
    ]:
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=f"^{path}: {message}"):
            DeltaBank.load(base, {"g": path})


def test_nothing_is_downloaded(base: Net, state: State) -> None:
    for call in (
        lambda: DeltaBank.load("google/ddpm-cifar10-32", {"g": state}),
        lambda: DeltaBank.load(base, {"g": "google/ddpm-cifar10-32"}),
    ):
        with pytest.raises(CheckpointError, match="^google/ddpm-cifar10-32: no such file or folder; .*pass the local"):
            call()


def test_a_missing_source_is_found_before_any_work(base: Net, tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(b"not read")
    with pytest.raises(CheckpointError, match="missing.pt: no such file"):
        DeltaBank.load(base, {"a": tmp_path / "bad.pt", "b": tmp_path / "missing.pt"})


class Wrapped(torch.nn.Module):
    """Holds a module under a name that is also a wrapper's, and one of its layers' names beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = torch.nn.Sequential(OrderedDict(conv=torch.nn.Conv2d(1, 1, 3)))
        self.conv = torch.nn.Conv2d(1, 1, 3)
        self.norm = torch.nn.GroupNorm(1, 2)


@pytest.mark.parametrize("prefix", ["", "unet.", "module.", "module.unet."])
def test_names_that_fit_are_no_wrappers(prefix: str) -> None:
    """Also where the base holds what a wrapper's prefix would hide."""
    base = Wrapped()
    part = {"unet.conv.weight": torch.ones(1, 1, 3, 3)}
    whole = {name: tensor + 1 for name, tensor in base.state_dict().items()}
    for state in (part, whole):
        if prefix.endswith("unet.") and state is part:
            continue  # a name twice in unet is one of the base's in a wrapper, which the next test has
        given = {prefix + name: tensor for name, tensor in state.items()}
        assert DeltaBank.load(base, {"g": given}).survey("g").support.keys() == state.keys()


def test_as_few_wrappers_as_make_the_names_fit() -> None:
    base = Wrapped()
    found = DeltaBank.load(base, {"g": {"unet.unet.conv.weight": torch.ones(1, 1, 3, 3)}}).survey("g")
    assert found.support.keys() == {"unet.conv.weight"}


def test_a_model_with_an_adapter_inside_is_named(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = Net()
    injected = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["conv_in"]), copy.deepcopy(base))
    torch.save(injected.state_dict(), path := tmp_path / "injected.pt")
    for source in (path, injected):
        message = (
            "key 'conv_in.(base_layer|lora_A).* is that of a model with an adapter of PEFT inside, .*merge_and_unload"
        )
        with pytest.raises(CheckpointError, match=message):
            DeltaBank.load(base, {"g": source})
