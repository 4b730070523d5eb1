"""Building delta packs: what is refused, replaced, noticed on the way, and said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch

from guda_fast import DeltaBank, Pack, append_pack, build_pack
from guda_fast.deltas import Delta, Dense, pack_folder
from guda_fast.deltas.pack_format import Rounding
from guda_fast.errors import CheckpointError
from pack_cases import Net, assert_same_models, deltas, net, normal


@pytest.fixture
def base() -> Net:
    return net()


def test_rounding_twice_states_bounds(base: Net, tmp_path: Path) -> None:
    """To float16, and then to factors of a lower rank, which a tolerance as large as this one accepts."""
    true = normal(8, 3, 3, 3)
    once = build_pack(base, {"g": Delta({"conv.weight": Dense(true)})}, tmp_path / "once", dtype="float16")
    pack = build_pack(base, {"g": once.path}, tmp_path / "twice", rank="auto", tolerance=0.9)
    assert pack["g"].survey.kind == "low-rank"
    was, found = (each.double().flatten() for each in (true, pack.delta("g").parts["conv.weight"].full(true.shape)))
    error, rounding = float((found - was).norm() / was.norm()), pack["g"].rounding
    assert 0.1 < error <= rounding.relative_error < error + 2 * 2**-11
    assert 0 < rounding.cosine <= float(found @ was / found.norm() / was.norm())
    exact = Rounding(1.0, 0.0)
    assert exact.then(rounding) == rounding.then(exact) == rounding
    assert Rounding(-0.5, 2.0).then(Rounding(-0.9, 1.0)) == Rounding(-1.0, 5.0)


def test_only_packs_are_replaced_and_on_request_only(base: Net, tmp_path: Path) -> None:
    one = build_pack(base, {"x": deltas()["rank 1"]}, tmp_path / "one")
    other = tmp_path / "other"
    other.write_bytes(content := safetensors.torch.save(base.state_dict()))
    with pytest.raises(FileExistsError, match=f"path must not exist, got {one.path}; pass force=True"):
        build_pack(base, deltas(), one.path)
    with pytest.raises(FileExistsError, match=f"path must be free, or that of a delta pack, got {other}"):
        build_pack(base, deltas(), other, force=True)
    with pytest.raises(FileExistsError, match=f"path must not be read for group 'g' too, got {one.path}"):
        build_pack(base, {"g": one.path}, one.path, force=True)
    assert other.read_bytes() == content and Pack.open(one.path).groups == ("x",)
    assert build_pack(base, deltas(), one.path, force=True).groups == tuple(deltas())


def test_a_file_that_comes_while_a_pack_is_built_is_not_replaced(base: Net, tmp_path: Path) -> None:
    path = tmp_path / "bank"
    with pytest.raises(FileExistsError, match="path must not exist"):
        build_pack(base, deltas(), path, progress=lambda done, total: path.write_text("mine"))
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("append", [False, True])
def test_headers_that_are_too_long_are_noticed_on_the_way(
    base: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, append: bool
) -> None:
    first = build_pack(base, {"x": deltas()["rank 1"]}, tmp_path / "bank").path
    monkeypatch.setattr(pack_folder, "MAX_HEADER", 1200)
    read: list[int] = []
    with pytest.raises(ValueError, match=f"^{'append' if append else 'build'}_pack: the header must have at most 1200"):
        if append:
            append_pack(first, deltas(), base=base, progress=lambda done, total: read.append(done))
        else:
            build_pack(base, deltas(), tmp_path / "other", progress=lambda done, total: read.append(done))
    assert 1 <= len(read) < len(deltas()) - 1
    assert list(tmp_path.iterdir()) == [first]


def test_identical_groups(base: Net, tmp_path: Path) -> None:
    same = {"same": Delta({})}
    with pytest.raises(CheckpointError, match="equals the base"):
        build_pack(base, same, tmp_path / "bank")
    pack = build_pack(base, same | deltas(), tmp_path / "bank", allow_identical=True)
    assert pack["same"].survey.kind == "none" and pack["same"].survey.support == {}
    with pytest.raises(CheckpointError, match=r"bank: group 'same': equals the base"):
        DeltaBank.load(base, pack)
    assert_same_models(
        DeltaBank.load(base, pack, allow_identical=True), DeltaBank.load(base, same | deltas(), allow_identical=True)
    )


def test_deltas_of_a_pack_are_read_when_asked_for(base: Net, tmp_path: Path) -> None:
    pack = build_pack(base, deltas(), tmp_path / "bank")
    parts = pack.delta("dense").parts
    assert set(parts) == {"conv.weight", "scale"} and len(parts) == 2 and "linear.bias" not in parts
    assert parts["scale"].value == 0.5
    with pytest.raises(KeyError):
        parts["linear.bias"]
    with pytest.raises(ValueError, match="Pack: group must be one of 'dense', .*, got 'x'"):
        pack.delta("x")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dtype": "int8"}, "build_pack: dtype must be one of 'float32', 'float16', 'stored', got 'int8'"),
        ({"rank": "4"}, "build_pack: rank must be one of 'off', 'auto', got '4'"),
        ({"tolerance": 1.0}, "build_pack: tolerance must be between 0 and"),
    ],
)
def test_arguments_are_checked(base: Net, tmp_path: Path, how: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_pack(base, deltas(), tmp_path / "bank", **how)  # type: ignore[arg-type]


def test_progress_and_a_folder_that_is_not_there(base: Net, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    build_pack(base, deltas(), tmp_path / "bank", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(k, 5) for k in range(1, 6)]
    with pytest.raises(OSError, match="nowhere"):
        build_pack(base, deltas(), tmp_path / "nowhere" / "bank")


def test_packs_are_opened_by_path(base: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build_pack(base, deltas(), "bank")
    os.symlink("bank", "link")
    pack = Pack.open("link")
    assert pack.path == tmp_path / "bank" and repr(pack) == f"Pack('{tmp_path / 'bank'}', 5 groups)"
    with pytest.raises(CheckpointError, match="nowhere: no such file"):
        Pack.open("nowhere")
    with pytest.raises(CheckpointError, match="nowhere: no such file"):
        DeltaBank.load(base, "nowhere")
