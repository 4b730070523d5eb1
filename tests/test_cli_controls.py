"""guda-fast score with control groups: scored like the groups, never ranked with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

import guda_fast as gf
from guda_fast.cli.controls import control_names
from tiny import perturbed, tiny_unet

CONTROLS = [f"control-{index}" for index in range(3)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, all/ with two groups and three controls, and the same in groups/ and controls/; queries/."""
    folder = tmp_path_factory.mktemp("files")
    base = tiny_unet()
    DDPMPipeline(base, DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder / "base")
    for index, name in enumerate(["cat", "dog", *CONTROLS]):
        model = perturbed(base, 0.01, 1 + index)
        for place in ("all", "controls" if name in CONTROLS else "groups"):
            model.save_pretrained(folder / place / name)
    (folder / "queries").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (4, 8, 8), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "queries" / f"{index}.png")
    return folder


def arguments(files: Path, groups: str, *extra: object) -> list[object]:
    common = ["score", files / "queries", "--base", files / "base", "--groups", files / groups]
    return [*common, "--start", 5, "--stride", 45, *extra]


def test_controls_give_p_values_and_are_not_ranked(files: Path, run) -> None:
    code, printed = run(*arguments(files, "groups", "--controls", files / "controls", "--top", 2))
    assert code == 0, printed
    found, null = (gf.Attribution.from_parquet(f"scores/{name}.parquet") for name in ("scores", "controls"))
    assert found.groups == ("cat", "dog") and null.groups == tuple(CONTROLS)
    bank = gf.DeltaBank.load(files / "base", {name: files / "all" / name for name in ("cat", "dog", *CONTROLS)})
    expected = gf.attribute(files / "queries", bank, gf.Protocol.from_scheduler(bank.scheduler, start=5, stride=45))
    np.testing.assert_array_equal(found.scores, expected.scores[:, :2])
    np.testing.assert_array_equal(found.p_value, expected.p_values(CONTROLS))
    np.testing.assert_array_equal(null.scores, expected.scores[:, 2:])
    best = found.top(1)[0][0]
    assert f"(p {best.p_value:.2g})" in printed and "2 groups and 3 controls" in printed and "control-0 " not in printed
    assert Path("scores/scores.csv").read_text().startswith("query,query_id,cat,dog\n")
    record = json.loads(Path("scores/run.json").read_text())
    assert record["groups"] == ["cat", "dog"] and record["controls"] == CONTROLS


def test_controls_among_the_groups_are_known_by_their_names(files: Path, run) -> None:
    assert run(*arguments(files, "groups", "--controls", files / "controls"))[0] == 0
    assert run(*arguments(files, "all", "--out", "named"))[0] == 0
    assert run(*arguments(files, "all", "--controls", "control-?", "--out", "pattern"))[0] == 0
    first, *others = (gf.Attribution.from_parquet(name) for name in ("scores", "named", "pattern"))
    for other in others:
        assert other.groups == first.groups
        np.testing.assert_array_equal(other.p_value, first.p_value)


def test_a_replay_from_another_folder_finds_the_controls(files: Path, run, tmp_path, monkeypatch) -> None:
    (tmp_path / "null").symlink_to(files / "controls")
    assert run(*arguments(files, "groups", "--controls", "null"))[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, printed = run("score", "--config", "../scores/run.json", "--out", "../again")
    assert code == 0, printed
    first, again = (gf.Attribution.from_parquet(tmp_path / name) for name in ("scores", "again"))
    np.testing.assert_array_equal(first.p_value, again.p_value)
    assert {**first.provenance, "seconds": None} == {**again.provenance, "seconds": None}


def test_a_result_without_controls_keeps_none_of_an_earlier_one(files: Path, run) -> None:
    assert run(*arguments(files, "all"))[0] == 0 and Path("scores/controls.parquet").exists()
    assert run(*arguments(files, "groups", "--force"))[0] == 0
    assert not Path("scores/controls.parquet").exists()
    assert gf.Attribution.from_parquet("scores").p_value is None


def test_controls_alone_are_groups(files: Path, run) -> None:
    assert run(*arguments(files, "controls"))[0] == 0
    found = gf.Attribution.from_parquet("scores")
    assert found.groups == tuple(CONTROLS) and found.p_value is None


def test_controls_of_a_pack_are_groups_of_it(files: Path, run) -> None:
    names = {name: files / "all" / name for name in ("cat", *CONTROLS)}
    gf.build_pack(files / "base", names, "bank.safetensors")
    common = ["score", files / "queries", "--base", files / "base", "--pack", "bank.safetensors", "--start", 50]
    code, printed = run(*common)
    assert code == 0 and gf.Attribution.from_parquet("scores").groups == ("cat",), printed
    code, printed = run(*common, "--controls", files / "controls", "--force")
    assert code == 1 and "--controls: must be a pattern of names in the pack, got the folder" in printed


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ("nowhere", "--controls: must be a folder, or a pattern that fits some of cat, dog and not all, got 'nowhere'"),
        ("*", "--controls: must be a folder, or a pattern that fits some of cat, dog and not all, got '*'"),
        ("empty", "--controls: must hold at least one model, found none in empty"),
        ("clash", "--controls: names must differ, also from those of --group and --groups, got 'cat' twice"),
    ],
)
def test_controls_that_are_none_are_named(files: Path, run, tmp_path: Path, controls: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "clash" / "cat").mkdir(parents=True)
    code, printed = run(*arguments(files, "groups", "--controls", controls))
    assert code == 1 and message in " ".join(printed.split()) and "Traceback" not in printed
    assert not (tmp_path / "scores").exists()


def test_names_of_controls() -> None:
    assert control_names(["cat", "control-0", "control-1"], None) == ["control-0", "control-1"]
    assert control_names(["cat", "dog"], None) == []
    assert control_names(["control-0"], None) == []
    assert control_names(["cat", "dog"], "d*") == ["dog"]


def test_controls_among_the_groups_are_controls_beside_a_folder_too(files: Path, run, tmp_path: Path) -> None:
    for name, place in (("control-0", "both"), ("cat", "both"), ("control-1", "null"), ("control-2", "null")):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / name).symlink_to(files / "all" / name)
    assert run(*arguments(files, tmp_path / "both", "--controls", "null"))[0] == 0
    found, null = (gf.Attribution.from_parquet(f"scores/{name}.parquet") for name in ("scores", "controls"))
    assert found.groups == ("cat",) and set(null.groups) == set(CONTROLS)
    record = json.loads(Path("scores/run.json").read_text())
    assert set(record["control_hashes"]) == set(CONTROLS) and None not in record["control_hashes"].values()
