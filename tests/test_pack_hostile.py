"""Packs that are damaged, lie, or mean harm: refused by file and key, at once and without taking memory."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bounds import allowed_seconds
from guda_fast import DeltaBank, Pack, append_pack, build_pack
from guda_fast.deltas import Part
from guda_fast.deltas.pack_format import MAGIC, MAX_HEADER, text_hash
from guda_fast.errors import CheckpointError
from pack_cases import Net, deltas, edit, net, read_header, refusal, write_header


@pytest.fixture
def base() -> Net:
    return net()


@pytest.fixture
def path(base: Net, tmp_path: Path) -> Path:
    build_pack(base, deltas(), tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture
def index(base: Net, path: Path) -> Path:
    append_pack(path, {"more": deltas()["dense"]}, base=base)
    return path


def assert_intact(path: Path, parts: dict[str, dict[str, Part]]) -> None:
    """The groups of a pack that opens are those that were written."""
    pack = Pack.open(path)
    for group, expected in parts.items():
        for name, part in pack.parts(group):
            for (_, one), (_, other) in zip(part.tensors(), expected[name].tensors(), strict=True):
                assert torch.equal(one, other)


def test_every_flipped_byte_is_found(path: Path) -> None:
    """In the header when the pack is opened, unless it is harmless; in the values when their group is read."""
    content = bytearray(path.read_bytes())
    values = 8 + int.from_bytes(content[:8], "little")
    parts, found = {name: dict(Pack.open(path).parts(name)) for name in deltas()}, set()
    for position in (*range(0, values, 97), *range(values, len(content), 13)):
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        content[position] ^= 1 << position % 8
        if position < values:
            message = refusal(lambda: assert_intact(path, parts))
            assert message.startswith(f"{path}: ") or not message
            continue
        refused = {group: refusal(lambda group=group: list(Pack.open(path).parts(group))) for group in parts}
        ((group, message),) = ((group, message) for group, message in refused.items() if message)
        assert message.startswith(f"{path}: group {group!r}: key '") and "checksum" in message
        found.add(group)
    assert found == parts.keys()


def test_a_damaged_group_is_not_applied_and_others_are(base: Net, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the last parameter, scale, which only the first group changes
    path.write_bytes(content)
    bank = DeltaBank.load(base, path)
    before = base.scale.item()
    with pytest.raises(CheckpointError, match=f"{path}: group 'dense': key 'scale:dense.float32' .* checksum"):
        bank.apply("dense")
    assert bank.applied_group is None and bank.model.scale.item() == before
    bank.apply("rank 2")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 20, 60, 500, -1000, -1])
def test_truncated_files(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=f"^{path}: "):
        Pack.open(path)


def test_a_file_that_is_cut_off_while_it_is_open(base: Net, path: Path) -> None:
    bank, parts = DeltaBank.load(base, path), Pack.open(path).parts("dense")
    next(parts)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(
        CheckpointError, match=f"{path}: key 'scale:dense.float32' cannot be read: the file was cut off"
    ):
        next(parts)
    with pytest.raises(CheckpointError, match=f"^{path}: is gone or has changed since it was opened"):
        bank.apply("dense")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"^{path}: is gone or has changed since it was opened"):
        bank.apply("dense")


@pytest.mark.parametrize("claimed", [0, 40, MAX_HEADER + 1, 2**40, 2**64 - 1])
def test_header_lengths_that_lie(path: Path, claimed: int) -> None:
    content = path.read_bytes()
    path.write_bytes(claimed.to_bytes(8, "little") + content[8:])
    with pytest.raises(CheckpointError, match=f"^{path}: (damaged|the header must have at most)"):
        Pack.open(path)


def test_other_files_are_no_packs(tmp_path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="x: must be a delta pack of guda_fast, found another kind of file"):
        Pack.open(tmp_path / "x")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: must be a file"):
        Pack.open(tmp_path)


def test_a_pipe_is_no_pack(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'pipe'}: must be a file, found something else"):
        Pack.open(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800"])
def test_names_that_no_file_can_have(index: Path, name: str) -> None:
    edit(index, set_at("files", 0, "file", to=name))
    with pytest.raises(CheckpointError, match="cannot be opened"):
        Pack.open(index)


def set_at(*keys: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(pack: Any) -> None:
        for key in keys[:-1]:
            pack = pack[key]
        pack[keys[-1]] = to

    return change


def many_groups(pack: dict[str, Any]) -> None:
    pack["groups"] = [{**pack["groups"][0], "name": str(k)} for k in range(1000)]


def twice(pack: dict[str, Any]) -> None:
    pack["groups"][1]["name"] = pack["groups"][0]["name"]


def lost(pack: dict[str, Any]) -> None:
    del pack["groups"][1]


def renamed(pack: dict[str, Any]) -> None:
    pack["supports"][0]["conv.wight"] = pack["supports"][0].pop("conv.weight")


HUGE = 10**400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (many_groups, "key 'conv.weight:dense.float32' must have a row for each of 1000 groups"),
        (twice, "key 'groups' must name each group once, found 'dense' 2 times"),
        (lost, r"must have a row for each of 1 groups, found shape \(2,"),
        (renamed, "key 'conv.wight:dense.float32' is missing, 'supports\\[0\\]' lists it"),
        (set_at("groups", to=[]), "key 'groups' must name a group, found none"),
        (set_at("groups", to={}), "key 'groups' must be a list, found {}"),
        (set_at("groups", 0, to=[]), r"key 'groups\[0\]' must be an object, found \[\]"),
        (set_at("groups", 0, "name", to=""), r"key 'groups\[0\].name' must not be empty"),
        (set_at("groups", 0, "name", to=7), r"key 'groups\[0\].name' must be text, found 7"),
        (set_at("groups", 0, "support", to=99), r"key 'groups\[0\].support' must be below 4, found 99"),
        (set_at("groups", 0, "support", to=-1), r"key 'groups\[0\].support' must be a count, found -1"),
        (set_at("groups", 0, "support", to=True), r"key 'groups\[0\].support' must be a count, found True"),
        (set_at("groups", 0, "support", to=HUGE), r"key 'groups\[0\].support' must be a count, found 1000"),
        (set_at("groups", 0, "hash", to="x" * 32), r"key 'groups\[0\].hash' must be 32 hexadecimal digits"),
        (set_at("groups", 0, "relative_rms", to=-1), r"key 'groups\[0\].relative_rms' must be in \[0, inf\], found -1"),
        (set_at("groups", 0, "relative_rms", to=HUGE), r"key 'groups\[0\].relative_rms' must be in \[0, inf\]"),
        (set_at("groups", 0, "relative_rms", to=float("nan")), "must be in .* found nan"),
        (
            set_at("groups", 0, "cosine", "tf32", to=1.5),
            r"key 'groups\[0\].cosine.tf32' must be in \[-1, 1\], found 1.5",
        ),
        (set_at("groups", 0, "cosine", to={}), r"key 'groups\[0\].cosine.float16' must be in \[-1, 1\], found None"),
        (set_at("groups", 0, "rounding", to=None), r"key 'groups\[0\].rounding' must be an object, found None"),
        (set_at("groups", 0, "checksums", to="00"), r"key 'groups\[0\].checksums' must be 8 hexadecimal digits for"),
        (set_at("groups", 0, "checksums", to="zz" * 8), r"key 'groups\[0\].checksums' must be 8 hexadecimal digits"),
        (set_at("groups", 0, "checksums", to=" 00000000000000 "), r"key 'groups\[0\].checksums' must be 8 hexa"),
        (set_at("groups", 0, "sources", to=[7]), r"key 'groups\[0\].sources' must be an object, found 7"),
        (set_at("supports", 0, "conv.weight", to="dense"), r"'supports\[0\].conv.weight' must be dense.DTYPE or"),
        (set_at("supports", 0, "conv.weight", to="dense.int8"), "must be dense.DTYPE or low-rank.R.DTYPE"),
        (set_at("supports", 1, "conv.weight", to="low-rank.0.float32"), "must be dense.DTYPE or low-rank.R.DTYPE"),
        (set_at("supports", 1, "conv.weight", to="low-rank.999999999.float32"), "up.999999999.float32' is missing"),
        (set_at("supports", to=7), "key 'supports' must be a list, found 7"),
        (set_at("base", "hash", to=""), "key 'base.hash' must be 32 hexadecimal digits"),
        (set_at("base", "config", to=7), "key 'base.config' must be an object, found 7"),
        (set_at("dtype", to="int8"), "key 'dtype' must be one of 'float32', 'float16', 'stored', found 'int8'"),
        (set_at("rank", to="4"), "key 'rank' must be one of 'off', 'auto', found '4'"),
        (set_at("tolerance", to=1), r"key 'tolerance' must be in \[0, 1\], found 1"),
        (set_at("tolerance", to="x"), r"key 'tolerance' must be in \[0, 1\], found 'x'"),
    ],
)
def test_headers_that_lie(path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit(path, change)
    with pytest.raises(CheckpointError, match=f"^{path}: .*{message}"):
        Pack.open(path)


def test_a_header_that_was_changed_without_its_hash(path: Path) -> None:
    header, values = read_header(path)
    header["__metadata__"]["pack"] = header["__metadata__"]["pack"].replace("rank 2", "rank 3")
    write_header(path, header, values)
    with pytest.raises(CheckpointError, match=f"^{path}: key 'pack' must have the hash that is written beside it"):
        Pack.open(path)


@pytest.mark.parametrize("version", ["2", "", None])
def test_another_version(path: Path, version: str | None) -> None:
    header, values = read_header(path)
    header["__metadata__"].pop("version")
    header["__metadata__"] |= {} if version is None else {"version": version}
    # The order in which a pack begins.
    header["__metadata__"] = {"format": header["__metadata__"].pop("format"), **header["__metadata__"]}
    write_header(path, header, values)
    with pytest.raises(CheckpointError, match=f"^{path}: key 'version' must be '1', found {version!r}"):
        Pack.open(path)


@pytest.mark.parametrize("text", ["", "[]", "7", "[" * 100_000, "{", '{"files":7}', '{"files":[]}'])
def test_metadata_that_is_no_header(path: Path, text: str) -> None:
    header, values = read_header(path)
    header["__metadata__"] |= {"pack": text, "hash": text_hash(text)}
    write_header(path, header, values)
    with pytest.raises(CheckpointError, match=f"^{path}: key '(pack|files)' must"):
        Pack.open(path)


def test_stacks_of_another_shape_than_the_base(base: Net, path: Path) -> None:
    header, values = read_header(path)
    header["conv.weight:dense.float32"]["shape"] = [2, 8, 27]
    write_header(path, header, values)
    with pytest.raises(
        CheckpointError, match=r"key 'conv.weight:dense.float32' must hold \(8, 3, 3, 3\) a group, found"
    ):
        DeltaBank.load(base, path)
    header["conv.weight:up.2.float32"]["shape"] = [2, 2, 8]
    write_header(path, header, values)
    with pytest.raises(CheckpointError, match=r"key 'conv.weight:up.2.float32' must have shape \(groups, O, 2\)"):
        Pack.open(path)
    header["conv.weight:up.2.float32"].update(shape=[2, 8, 2], dtype="I32")
    write_header(path, header, values)
    with pytest.raises(CheckpointError, match="key 'conv.weight:up.2.float32' must have the dtype that its name says"):
        Pack.open(path)


def rename_parameter(path: Path, new: str) -> None:
    header, values = read_header(path)
    write_header(path, {key.replace("linear.bias", new): about for key, about in header.items()}, values)
    edit(path, lambda pack: [s.update({new: s.pop("linear.bias")}) for s in pack["supports"] if "linear.bias" in s])


@pytest.mark.parametrize("name", ["linear.bais", "norm.num_batches_tracked"])
def test_parameters_that_the_base_lacks_or_holds_as_integers(base: Net, path: Path, name: str) -> None:
    rename_parameter(path, name)
    with pytest.raises(CheckpointError, match=f"^{path}: key '{name}' must be a floating tensor of the base"):
        DeltaBank.load(base, path)


def test_values_that_are_not_finite_with_their_right_checksum(base: Net, path: Path) -> None:
    import zlib

    content = bytearray(path.read_bytes())
    content[-4:] = torch.tensor([torch.nan]).numpy().tobytes()
    path.write_bytes(content)
    checksum = f"{zlib.crc32(bytes(content[-4:])):08x}"
    edit(path, lambda pack: pack["groups"][0].update(checksums=pack["groups"][0]["checksums"][:8] + checksum))
    bank = DeltaBank.load(base, path)
    with pytest.raises(CheckpointError, match=r"group 'dense': key 'scale:dense.float32' must be finite, found 1 NaN"):
        bank.apply("dense")


def test_a_hash_that_is_not_that_of_the_values(path: Path) -> None:
    edit(path, set_at("groups", 0, "hash", to="0" * 32))
    with pytest.raises(CheckpointError, match="group 'dense': key 'hash' must be that of the values, found another"):
        Pack.open(path).verify("dense")


@pytest.mark.parametrize("name", ["../bank", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "x\0y"])
def test_names_that_leave_the_folder(index: Path, name: str) -> None:
    edit(index, set_at("files", 0, "file", to=name))
    with pytest.raises(CheckpointError, match=rf"^{index}: key 'files\[0\].file' must be the name of a file in"):
        Pack.open(index)


def test_an_index_that_names_itself_or_a_file_twice(base: Net, index: Path) -> None:
    edit(index, lambda pack: pack["files"].append(pack["files"][0]))
    with pytest.raises(CheckpointError, match="key 'files' must name each file once"):
        Pack.open(index)
    edit(index, set_at("files", to=[{"file": index.name, "bytes": 1, "hash": "0" * 32}]))
    with pytest.raises(CheckpointError, match="must be the file that"):
        Pack.open(index)


def test_an_index_of_an_index(base: Net, index: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.write_bytes(index.read_bytes())
    hash_ = read_header(inner)[0]["__metadata__"]["hash"]
    edit(index, set_at("files", to=[{"file": "inner", "bytes": inner.stat().st_size, "hash": hash_}]))
    with pytest.raises(CheckpointError, match=f"^{inner}: key 'base' must be an object, found None"):
        Pack.open(index)


def test_files_of_two_packs(base: Net, path: Path, index: Path, tmp_path: Path) -> None:
    """Of which one holds a group of the same name, and another belongs to another base."""
    files = Pack.open(index).files
    for change, message in (
        (set_at("groups", 0, "name", to="rank 2"), "key 'groups' holds group 'rank 2', as does"),
        (set_at("base", "hash", to="0" * 32), "key 'base.hash' must be that of"),
    ):
        content, entry = files[1].read_bytes(), index.read_bytes()
        edit(files[1], change)
        hash_, size = read_header(files[1])[0]["__metadata__"]["hash"], files[1].stat().st_size
        edit(index, lambda pack, hash_=hash_, size=size: pack["files"][1].update(hash=hash_, bytes=size))
        with pytest.raises(CheckpointError, match=f"^{files[1]}: {message}"):
            Pack.open(index)
        files[1].write_bytes(content)
        index.write_bytes(entry)


def test_the_largest_header_takes_less_than_a_second_and_little_memory(path: Path) -> None:
    """Of what costs most for its length: the smallest objects."""
    header, values = read_header(path)
    text = '{"groups":[' + "{}," * (MAX_HEADER // 3 - 4000) + "{}]}"
    header["__metadata__"] |= {"pack": text, "hash": text_hash(text)}
    write_header(path, header, values)
    assert MAX_HEADER - 20_000 < int.from_bytes(path.read_bytes()[:8], "little") <= MAX_HEADER
    begin = time.process_time()
    with pytest.raises(CheckpointError, match="key 'base' must be an object"):
        Pack.open(path)
    assert time.process_time() - begin < allowed_seconds()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            Pack.open(path)
        assert tracemalloc.get_traced_memory()[1] < 32 * MAX_HEADER
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_headers(path: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever is written, a pack opens and gives finite parts, or says what is wrong with a CheckpointError."""
    header, values = read_header(path)
    pack = json.loads(header["__metadata__"]["pack"])
    for _ in range(data.draw(st.integers(1, 3))):
        target: Any = data.draw(st.sampled_from([pack, header]))
        while isinstance(target, dict | list) and target:
            keys = sorted(target) if isinstance(target, dict) else range(len(target))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(target[key], dict | list) or not target[key] or data.draw(st.booleans()):
                target[key] = data.draw(
                    st.none()
                    | st.booleans()
                    | st.integers()
                    | st.floats()
                    | st.text(max_size=8)
                    | st.lists(st.integers(0, 9), max_size=3)
                    | st.just({})
                )
                break
            target = target[key]
    text = json.dumps(pack)
    if isinstance(header.get("__metadata__"), dict):
        own = {"pack": text, "hash": text_hash(text)}
        header["__metadata__"] = {"format": "guda_fast.pack", **header["__metadata__"], **own}
    fuzzed = tmp_path / "fuzzed"
    write_header(fuzzed, header, values)
    message = refusal(lambda: assert_finite(Pack.open(fuzzed)))
    assert message.startswith(f"{fuzzed}: ") or not message


def assert_finite(pack: Pack) -> None:
    for group in pack.groups:
        assert pack[group].survey.values >= 0
        for _, part in pack.parts(group):
            assert all(torch.isfinite(tensor).all() for _, tensor in part.tensors())


def test_what_a_pack_begins_with(path: Path) -> None:
    assert path.read_bytes()[8:].startswith(MAGIC)
