"""Groups that are added to a pack: nothing is written again, and nothing half-written is ever read."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from guda_fast import DeltaBank, Pack, append_pack, build_pack
from guda_fast.deltas import Delta, pack_folder, pack_writer
from guda_fast.deltas.pack_format import IndexEntry
from guda_fast.errors import CheckpointError
from pack_cases import Net, changed, deltas, net, refusal
from tiny import perturbed, tiny_unet

GROUPS = tuple(deltas())


@pytest.fixture
def base() -> Net:
    return net()


def some(*positions: int) -> dict[str, Delta]:
    return {GROUPS[k]: deltas()[GROUPS[k]] for k in positions}


@pytest.fixture
def path(base: Net, tmp_path: Path) -> Path:
    """A pack of two groups."""
    build_pack(base, some(0, 1), tmp_path / "bank.safetensors")
    return tmp_path / "bank.safetensors"


def test_a_pack_that_grew_holds_what_one_built_at_once_does(base: Net, path: Path, tmp_path: Path) -> None:
    append_pack(path, some(2), base=base)
    pack = append_pack(path, some(3, 4), base=base, dtype="stored")
    at_once = build_pack(base, deltas(), tmp_path / "at once")
    assert pack.groups == GROUPS and len(pack.files) == 3
    assert [setting[0] for setting in pack.settings] == ["float32", "float32", "stored"]
    assert DeltaBank.load(base, path).hash == DeltaBank.load(base, at_once).hash
    for group in GROUPS:
        pack.verify(group)
        assert pack[group].rounding == at_once[group].rounding


def test_appending_writes_nothing_again(base: Net, path: Path) -> None:
    inode, modified = path.stat().st_ino, path.stat().st_mtime_ns
    first = append_pack(path, some(2), base=base).files
    assert (first[0].stat().st_ino, first[0].stat().st_mtime_ns) == (inode, modified)
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in first}
    second = append_pack(path, some(3), base=base).files
    assert second[:2] == first and {f: (f.stat().st_ino, f.stat().st_mtime_ns) for f in first} == before
    assert path not in second
    assert {*path.parent.iterdir()} == {path, *second}


def test_a_pack_that_is_open_is_not_disturbed(base: Net, path: Path) -> None:
    bank = DeltaBank.load(base, path)
    append_pack(path, some(2), base=base)
    append_pack(path, some(3), base=base)
    expected = DeltaBank.load(base, some(0, 1))
    for group in bank.groups:
        assert torch.equal(bank.apply(group).conv.weight, expected.apply(group).conv.weight)


def test_the_base_is_found_where_it_was(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    build_pack("base", {"a": perturbed(unet)}, "unet.safetensors")
    monkeypatch.chdir("/")
    assert append_pack(tmp_path / "unet.safetensors", {"b": perturbed(unet, seed=2)}).groups == ("a", "b")
    with pytest.raises(ValueError, match="append_pack: base must be given, because .*bank.safetensors was built from"):
        append_pack(path, some(2))


def test_refused_groups_leave_the_pack_as_it_is(base: Net, path: Path) -> None:
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match=f"{path}: must not hold group 'rank 2' already"):
        append_pack(path, some(2, 1), base=base)
    with pytest.raises(CheckpointError, match="'base.hash' must be that of the base"):
        append_pack(path, some(2), base=changed(base, "scale", 1e-6))
    with pytest.raises(CheckpointError, match=r"counterfactuals\['x'\]: key 'unknown' is not in the base"):
        append_pack(path, {"x": Delta({"unknown": deltas()["dense"].parts["scale"]})}, base=base)
    assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("start", ["one file", "an index"])
@pytest.mark.parametrize("stop_at", range(12))
def test_interrupted_anywhere(base: Net, path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, start: str) -> None:
    """Before each step that changes the folder: the pack is the old or the new one, and the next append succeeds."""
    if start == "an index":
        append_pack(path, some(2), base=base)
    before = Pack.open(path).groups
    steps = 0

    def stopping(function):
        def step(*arguments, **options):
            nonlocal steps
            steps += 1
            if steps == stop_at + 1:
                raise Interrupted
            return function(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        for name in ("link", "replace", "fsync", "unlink"):
            patch.setattr(os, name, stopping(getattr(os, name)))
        try:
            append_pack(path, some(3), base=base)
            done = True
        except Interrupted:
            done = False
    now = Pack.open(path)
    assert now.groups in (before, (*before, GROUPS[3]))
    assert now.groups == (*before, GROUPS[3]) or not done
    for group in now.groups:
        now.verify(group)
    again = append_pack(path, some(3) if now.groups == before else some(4), base=base)
    for group in again.groups:
        again.verify(group)


def test_steps_were_interrupted(base: Net, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve are enough for the test above, and not far too many."""
    calls: list[str] = []
    for name in ("link", "replace", "fsync", "unlink"):
        function = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, function=function, **k: (calls.append(name), function(*a, **k))
        )
    append_pack(path, some(2), base=base)
    assert calls.count("link") == 1 and calls.count("replace") == 3
    assert 6 <= len(calls) < 12


def test_groups_added_at_the_same_time(base: Net, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another append comes first, while ours reads its sources."""
    load = DeltaBank.load

    def slow(*arguments: object, **options: object) -> DeltaBank:
        monkeypatch.setattr(pack_writer.DeltaBank, "load", load)
        append_pack(path, some(2), base=base)
        return load(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pack_writer.DeltaBank, "load", slow)
    with pytest.raises(CheckpointError, match="was changed while groups were added to it; add them again"):
        append_pack(path, some(3), base=base)
    assert Pack.open(path).groups == GROUPS[:3]
    assert {*path.parent.iterdir()} == {path, *Pack.open(path).files}


def test_equal_groups_added_at_the_same_time(base: Net, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both write the same bytes, under names of their own: who comes last takes away only what it wrote."""
    add = pack_writer.add_to_index

    def late(*arguments: Any) -> None:
        monkeypatch.setattr(pack_writer, "add_to_index", add)
        append_pack(path, some(2), base=base)
        add(*arguments)

    monkeypatch.setattr(pack_writer, "add_to_index", late)
    with pytest.raises(CheckpointError, match="was changed while groups were added to it; add them again"):
        append_pack(path, some(2), base=base)
    pack = Pack.open(path)
    assert pack.groups == GROUPS[:3] and {*path.parent.iterdir()} == {path, *pack.files}
    for group in pack.groups:
        pack.verify(group)


def test_equal_groups_added_by_two_processes(base: Net, path: Path) -> None:
    torch.save(base.state_dict(), path.parent / "base")
    program = """
import sys, torch
from pack_cases import deltas, net
from guda_fast import append_pack
base = net()
base.load_state_dict(torch.load(sys.argv[2], weights_only=True))
print("ready", flush=True)
sys.stdin.readline()
append_pack(sys.argv[1], {"rank 1": deltas()["rank 1"]}, base=base)
"""
    command = [sys.executable, "-c", program, str(path), str(path.parent / "base")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen(command, text=True, cwd=Path(__file__).parent, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], errors
    assert any("was changed while groups" in error or "must not hold group" in error for error in errors), errors
    pack = Pack.open(path)
    assert pack.groups == (*GROUPS[:2], "rank 1")
    for group in pack.groups:
        pack.verify(group)


@pytest.mark.parametrize("groups", ["bank.safetensors", Path("bank.safetensors"), None, ["a"]])
def test_only_a_mapping_is_added(base: Net, path: Path, groups: Any) -> None:
    """The path of a pack would be taken for a bank whose groups nobody compared with the pack's."""
    other = build_pack(base, some(0), path.parent / "other")
    for given in (groups, other, other.path):
        with pytest.raises(TypeError, match="append_pack: counterfactuals must be a mapping of group names, got"):
            append_pack(path, given, base=base)
    assert {*path.parent.iterdir()} == {path, other.path}


def test_what_cannot_be_opened_never_becomes_the_index(base: Net, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = path.read_bytes()
    entry = pack_folder.IndexEntry

    def wrong(file: str, size: int, hash_: str) -> IndexEntry:
        return entry(file, size + 1, hash_)

    monkeypatch.setattr(pack_writer, "IndexEntry", wrong)
    with pytest.raises(CheckpointError, match="must be the file that"):
        append_pack(path, some(2), base=base)
    assert path.read_bytes() == content
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"bank.{Pack.open(path).hash}.safetensors"}


def test_building_waits_for_an_append(base: Net, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the moment when the index is compared and that when it is written."""
    publish, started = pack_folder.publish, threading.Event()
    build = threading.Thread(target=lambda: (started.set(), build_pack(base, some(0), path, force=True)))

    def slow(target: Path, content: Any) -> None:
        if target == path:
            build.start()
            started.wait()
            build.join(1.0)
            assert build.is_alive() and Pack.open(path).groups == GROUPS[:2]
        publish(target, content)

    monkeypatch.setattr(pack_folder, "publish", slow)
    append_pack(path, some(2), base=base)
    build.join()
    assert Pack.open(path).groups == GROUPS[:1]
    assert not [file for file in path.parent.iterdir() if file.name.endswith(".lock")]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks(base: Net, path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def no_locks(descriptor: int, how: int) -> None:
        assert stat.S_ISREG(os.fstat(descriptor).st_mode)  # folders cannot be locked over NFS
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            append_pack(path, some(2), base=base)
    else:
        assert append_pack(path, some(2), base=base).groups == GROUPS[:3]


def test_no_file_stays_open(base: Net, path: Path) -> None:
    for k in range(2, 5):
        append_pack(path, some(k), base=base)
    before = len(os.listdir("/proc/self/fd"))
    bank = DeltaBank.load(base, path)
    for group in bank.groups:
        bank.apply(group)
        next(iter(bank.deltas[0].parts.values()))
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_more_files_can_be_open(base: Net, path: Path) -> None:
    """At whichever of the files that opening takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first, messages = os.open(path, os.O_RDONLY), []
    os.close(first)
    for more in range(4):
        resource.setrlimit(resource.RLIMIT_NOFILE, (first + more, hard))
        try:
            messages.append(refusal(lambda: Pack.open(path)))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert messages[0].startswith(f"{path}: cannot be opened: Too many open files") and not messages[-1]
    assert all(message.startswith(f"{path}: cannot be ") for message in messages if message)


def test_a_file_system_without_links(base: Net, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*arguments: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    pack = append_pack(path, some(2), base=base)
    for group in pack.groups:
        pack.verify(group)


def test_what_an_interrupted_append_left_is_replaced(base: Net, path: Path, tmp_path: Path) -> None:
    """Also where it is no longer what it was: the only good copy must not be lost."""
    content = path.read_bytes()
    left = path.with_name(f"bank.{Pack.open(path).hash}.safetensors")
    left.write_bytes(content[:-1])
    pack = append_pack(path, some(2), base=base)
    assert left in pack.files and left.read_bytes() == content
    assert {*tmp_path.iterdir()} == {path, *pack.files}


def test_groups_are_added_as_the_last_were(base: Net, path: Path, tmp_path: Path) -> None:
    build_pack(base, some(0), tmp_path / "half", dtype="float16", rank="auto", tolerance=1e-3)
    pack = append_pack(tmp_path / "half", some(1), base=base)
    assert pack.settings == (("float16", "auto", 1e-3),) * 2
    again = append_pack(tmp_path / "half", some(2), base=base, dtype="float32", rank="off")
    assert again.settings[-1] == ("float32", "off", 1e-3)
    with pytest.raises(ValueError, match="append_pack: rank must be one of 'off', 'auto', got ''"):
        append_pack(tmp_path / "half", some(3), base=base, rank="")


def test_a_file_of_the_pack_that_is_missing_cut_or_another(base: Net, path: Path) -> None:
    last = append_pack(path, some(2), base=base).files[-1]
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(CheckpointError, match=f"^{last}: cannot be opened: No such file"):
        Pack.open(path)
    last.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"^{last}: damaged or truncated"):
        Pack.open(path)
    shutil.copy(Pack.open(build_pack(base, some(3), path.with_name("x")).path).path, last)
    with pytest.raises(CheckpointError, match=f"^{last}: must be the file that {path} names, found another"):
        Pack.open(path)
