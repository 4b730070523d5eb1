"""Files that lie, are damaged or mean harm: refused by name, in under a second and little memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch

from bounds import allowed_seconds
from guda_fast.deltas import DeltaBank, Source
from guda_fast.errors import CheckpointError
from tiny import perturbed, tiny_unet

pytest.importorskip("diffusers")
State = dict[str, torch.Tensor]
MEGABYTES = 64


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    base = tiny_unet()
    # What only the first use imports is no part of what a file costs.
    DeltaBank.load(base, {"g": perturbed(base)})
    return base


@pytest.fixture
def state(base: torch.nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in perturbed(base).state_dict().items()}


def peak_kilobytes() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


@contextmanager
def bounded() -> Iterator[None]:
    """Fails when the block takes more than a second of an idle core, or more than 64 MB of memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = peak_kilobytes()
    start = time.process_time()  # of all threads: what else the machine does is no part of it
    yield
    seconds = time.process_time() - start
    assert seconds < allowed_seconds()
    assert peak_kilobytes() - before < MEGABYTES * 1024


def refused(base: torch.nn.Module, source: object, message: str) -> None:
    """The source is refused with its name by the time that all its values were read, within the bounds."""
    with bounded(), pytest.raises(CheckpointError, match=message):
        DeltaBank.load(base, {"g": source}).survey()  # type: ignore[dict-item]


def header(content: object, length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS: dict[str, bytes] = {
    "longer than the file": header({}, 1 << 40),
    "longest": header({}, (1 << 64) - 1),
    "zero": header({}, 0) + b"{",
    "into the values": header({"a": entry("F32", [1], 0, 4)}, 30) + bytes(4),
    "values beyond the end": header({"a": entry("F32", [1 << 30], 0, 4 << 30)}) + bytes(16),
    "shape beyond the values": header({"a": entry("F32", [1 << 40], 0, 4)}) + bytes(4),
    "shape overflow": header({"a": entry("F32", [1 << 62, 1 << 62], 0, 4)}) + bytes(4),
    "negative shape": header({"a": entry("F32", [-1], 0, 4)}) + bytes(4),
    "negative offset": header({"a": entry("F32", [1], -4, 0)}) + bytes(4),
    "offsets reversed": header({"a": entry("F32", [1], 4, 0)}) + bytes(4),
    "overlap": header({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}) + bytes(4),
    "hole": header({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}) + bytes(12),
    "same key twice": header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    )
    + bytes(8),
    "unknown dtype": header({"a": entry("F31", [1], 0, 4)}) + bytes(4),
    "no dtype": header({"a": {"shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
    "list": header([1, 2]),
    "deep": header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "not text": header(b'{"\xff\xfe": 1}'),
}


@pytest.mark.parametrize("lie", HEADERS)
def test_safetensors_headers_that_lie(base: torch.nn.Module, tmp_path: Path, lie: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[lie])
    refused(base, path, f"^{path}: ")


@pytest.mark.parametrize("form", ["safetensors", "zip", "old"])
@pytest.mark.parametrize("left", [0.999, 0.5, 0.01])
def test_truncated_files(base: torch.nn.Module, state: State, tmp_path: Path, form: str, left: float) -> None:
    path = tmp_path / "model.ckpt"
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    os.truncate(path, int(left * path.stat().st_size))
    refused(base, path, f"^{path}: (damaged or truncated|neither a safetensors file nor a torch checkpoint)")


@pytest.mark.parametrize("member", ["data.pkl", "data/0", "version", "extra"])
def test_zip_bombs(base: torch.nn.Module, state: State, tmp_path: Path, member: str) -> None:
    """A quarter of a gigabyte of zeros in a quarter of a megabyte, which torch itself would unpack."""
    torch.save(state, buffer := io.BytesIO())
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(buffer) as intact, zipfile.ZipFile(path, "w") as bomb:
        root = intact.namelist()[0].split("/")[0]
        for info in intact.infolist():
            if info.filename != f"{root}/{member}":
                bomb.writestr(info.filename, intact.read(info))
        deflated = zipfile.ZipInfo(f"{root}/{member}", date_time=(2020, 1, 1, 0, 0, 0))
        deflated.compress_type = zipfile.ZIP_DEFLATED
        with bomb.open(deflated, "w", force_zip64=True) as stream:
            for _ in range(16):
                stream.write(bytes(1 << 24))
    assert path.stat().st_size < 2**20
    refused(base, path, f"^{path}: '.*{member}' must be stored as torch.save does, found it compressed to")


class Canary:
    """Leaves a folder behind when the pickle that holds it is loaded in full."""

    def __init__(self, path: Path, call: Callable[..., object] = os.mkdir) -> None:
        self.path, self.call = path, call

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        code = f"__import__('os').mkdir({str(self.path)!r})"
        return self.call, (str(self.path) if self.call is os.mkdir else code,)


@pytest.mark.parametrize("call", [os.mkdir, eval, exec], ids=["mkdir", "eval", "exec"])
@pytest.mark.parametrize("form", ["zip", "old", "pickle", "list"])
def test_code_in_pickles_never_runs(
    base: torch.nn.Module, state: State, tmp_path: Path, form: str, call: Callable[..., object]
) -> None:
    path, canary = tmp_path / "model.pt", tmp_path / "ran"
    content: object = {"state_dict": state, "hook": Canary(canary, call)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save([content] if form == "list" else content, path, _use_new_zipfile_serialization=form != "old")
    refused(base, path, f"^{path}: (holds more than tensors and plain containers|damaged or truncated)")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary, call)))  # noqa: S301 (the canary sings when it is let out)
    assert canary.exists()


def test_pickles_beside_a_model_are_not_opened(base: torch.nn.Module, tmp_path: Path) -> None:
    perturbed(base).save_pretrained(tmp_path)
    canary = tmp_path / "ran"
    for name in ("diffusion_pytorch_model.bin", "training_state.pt", "optimizer.pt", "ema_model.pt"):
        torch.save(Canary(canary), tmp_path / name)
    DeltaBank.load(base, {"g": tmp_path}).survey()
    refused(base, Source(tmp_path, weights="ema"), "ema_model.pt: holds more than tensors")
    assert not canary.exists()


def swapped(data: bytes) -> bytes:
    """A safetensors file whose values are in the order of a big-endian machine."""
    start = 8 + int.from_bytes(data[:8], "little")
    values = data[start:]
    return data[:start] + b"".join(values[i : i + 4][::-1] for i in range(0, len(values), 4))


def test_wrong_endianness(base: torch.nn.Module, state: State, tmp_path: Path) -> None:
    """A header length of the other order is a lie; values of the other order are huge, or no numbers."""
    data = safetensors.torch.save(state)
    path = tmp_path / "model.safetensors"
    path.write_bytes(data[:8][::-1] + data[8:])
    refused(base, path, f"^{path}: damaged or truncated safetensors file")
    path.write_bytes(swapped(data))
    refused(base, path, f"^{path}: key '.*' must be finite, found")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_torch_checkpoints_of_the_other_order_say_so(
    base: torch.nn.Module, state: State, tmp_path: Path, suffix: str
) -> None:
    """torch writes the order into the file, and swaps: the same model comes out."""
    torch.save(state, buffer := io.BytesIO())
    path = tmp_path / f"model.{suffix}"
    with zipfile.ZipFile(buffer) as little, zipfile.ZipFile(path, "w") as big:
        for info in little.infolist():
            values = little.read(info)
            if info.filename.endswith("byteorder"):
                values = b"big"
            elif "/data/" in info.filename:
                values = b"".join(values[i : i + 4][::-1] for i in range(0, len(values), 4))
            big.writestr(info.filename, values)
    with bounded():
        hashes = DeltaBank.load(base, {"big": path, "memory": state}).delta_hashes
    assert hashes["big"] == hashes["memory"]


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.input_blocks.", "lora_unet_", "shadow_params.", "module."]
)
@pytest.mark.parametrize("form", ["safetensors", "memory"])
def test_ten_thousand_keys(base: torch.nn.Module, tmp_path: Path, prefix: str, form: str) -> None:
    state = {
        f"{prefix}{i}.lora_down.weight" if "lora" in prefix else f"{prefix}{i}.x": torch.ones(1) for i in range(10_000)
    }
    source: object = state
    if form == "safetensors":
        safetensors.torch.save_file(state, source := tmp_path / "model.safetensors")
    origin = r"counterfactuals\['g'\]" if form == "memory" else str(source)
    refused(base, source, f"^{origin}: ")


def test_tensors_that_claim_to_be_large(base: torch.nn.Module, state: State, tmp_path: Path) -> None:
    """A view of four bytes as a terabyte costs nothing to write; it must cost nothing to refuse."""
    path = tmp_path / "model.pt"
    torch.save({**state, "conv_in.weight": torch.zeros(1).expand(1 << 20, 1 << 18)}, path)
    refused(base, path, rf"^{path}: key 'conv_in.weight' must have shape \(8, 1, 3, 3\) as in the base")


def test_storages_that_claim_to_be_large(base: torch.nn.Module, state: State, tmp_path: Path) -> None:
    """The number of elements in the pickle is 2 to the 40th, the file has 8."""
    path = tmp_path / "model.pt"
    lonely = {"conv_in.bias": state["conv_in.bias"]}
    for zipped in (True, False):
        torch.save(lonely, path, _use_new_zipfile_serialization=zipped)
        data = path.read_bytes()
        count = b"X\x03\x00\x00\x00cpuq\x06K\x08" if b"X\x03\x00\x00\x00cpuq\x06K\x08" in data else b"K\x08"
        assert count in data
        huge = count[:-2] + b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
        path.write_bytes(data.replace(count, huge, 1))
        refused(base, path, f"^{path}: (damaged or truncated|neither)")


def test_a_not_a_number_is_found_by_name(base: torch.nn.Module, state: State, tmp_path: Path) -> None:
    state["mid_block.resnets.0.conv1.weight"][3, 2, 1, 0] = float("nan")
    for name in ("model.safetensors", "model.pt"):
        path = tmp_path / name
        safetensors.torch.save_file(state, path) if name.endswith("s") else torch.save(state, path)
        message = r"key 'mid_block.resnets.0.conv1.weight' must be finite, found 1 NaN .* at \(3, 2, 1, 0\)"
        refused(base, path, f"^{path}: {message}")


def test_a_lora_for_another_model(base: torch.nn.Module, tmp_path: Path) -> None:
    attention = next(name for name in base.state_dict() if name.endswith("to_q.weight")).removesuffix(".weight")
    for name, size in [("up_blocks.7.attentions.0.to_q", 16), (attention, 320)]:
        state = {f"unet.{name}.lora_A.weight": torch.ones(2, size), f"unet.{name}.lora_B.weight": torch.ones(size, 2)}
        safetensors.torch.save_file(state, path := tmp_path / "lora.safetensors")
        refused(base, path, f"^{path}: key 'unet.{name}.lora_[AB].weight' (is not in the base|must have shape)")


def test_names_that_leave_their_folder(base: torch.nn.Module, state: State, tmp_path: Path) -> None:
    (folder := tmp_path / "model").mkdir()
    base.save_pretrained(folder)
    secret = tmp_path / "secret.safetensors"
    safetensors.torch.save_file(state, secret)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    for name in ("../secret.safetensors", str(secret), "..", ".", "", "a/../../secret.safetensors", "\0", "x" * 5000):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(state, name)}))
        refused(base, folder, f"^{folder}.*: (key '.*' must be in a file of this folder|cannot be read)")
    for key in ("../../etc/passwd", "/etc/passwd", "..\\x", "conv_in.weight/../conv_in.bias", "\0", "%s%n", "\u202e"):
        safetensors.torch.save_file({**state, key: torch.ones(1)}, secret)
        refused(base, secret, f"^{secret}: key .* is not in the base")


def test_members_of_an_archive_that_leave_it(base: torch.nn.Module, state: State, tmp_path: Path) -> None:
    torch.save(state, buffer := io.BytesIO())
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(buffer) as intact, zipfile.ZipFile(path, "w") as changed:
        for info in intact.infolist():
            changed.writestr(f"../../{info.filename}", intact.read(info))
    before = sorted(tmp_path.rglob("*"))
    # Whether torch finds its members there or not is for torch to say.
    with bounded(), suppress(CheckpointError):
        DeltaBank.load(base, {"g": path}).survey()
    assert sorted(tmp_path.rglob("*")) == before  # nothing is ever unpacked


@pytest.mark.parametrize(
    "prefix", ["module.", "unet.", "shadow_params.", "base_model.model.", "lora_unet_", "a.", "a_"]
)
@pytest.mark.parametrize("end", ["conv_in.weight", "conv_in.lora_A.weight", "conv_in.lora_down.weight"])
def test_names_of_many_characters(base: torch.nn.Module, tmp_path: Path, prefix: str, end: str) -> None:
    """Wrappers in wrappers, which would be taken off one by one."""
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({prefix * (1_000_000 // len(prefix)) + end: torch.ones(1)}, path)
    refused(base, path, f"^{path}: key '{prefix}.*' must have at most 1000 characters, found ")
    many = {prefix * (900 // len(prefix)) + f"{i}.{end}": torch.ones(1) for i in range(10_000)}
    refused(base, many, r"^counterfactuals\['g'\]: ")


def test_factors_of_a_rank_that_no_file_holds(base: torch.nn.Module, tmp_path: Path) -> None:
    """Views of four bytes as factors of rank two million, which fit the base's layer."""
    layer = next(name for name in base.state_dict() if name.endswith("to_q.weight")).removesuffix(".weight")
    size = base.state_dict()[f"{layer}.weight"].shape[0]
    state = {f"{layer}.lora_A.weight": torch.zeros(1).expand(2_000_000, size)}
    state |= {f"{layer}.lora_B.weight": torch.zeros(1).expand(size, 2_000_000)}
    torch.save(state, path := tmp_path / "lora.pt")
    assert path.stat().st_size < 4096
    refused(base, path, f"^{path}: key '{layer}.lora_A.weight' must have memory for each of its values, found a view")
