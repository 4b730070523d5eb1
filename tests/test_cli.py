"""guda-fast score and doctor, as typed: results, replays, cost, and what a typo or a damaged file says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

import guda_fast as gf
from tiny import perturbed, tiny_unet


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ (a pipeline), unlearned/cat and unlearned/dog (models), dog.safetensors, queries/."""
    folder = tmp_path_factory.mktemp("files")
    base = tiny_unet()
    DDPMPipeline(base, DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder / "base")
    perturbed(base, 0.01, 1).save_pretrained(folder / "unlearned" / "cat")
    perturbed(base, 0.01, 2).save_pretrained(folder / "unlearned" / "dog")
    (folder / "queries").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (3, 8, 8), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "queries" / f"{index}.png")
    return folder


def score_arguments(files: Path, *extra: object) -> list[object]:
    common = ["score", files / "queries", "--base", files / "base", "--groups", files / "unlearned"]
    return [*common, "--start", 5, "--stride", 20, *extra]


def test_score_writes_what_attribute_returns(files, run, tmp_path) -> None:
    code, printed = run(*score_arguments(files, "--top", 1))
    assert code == 0, printed
    bank = gf.DeltaBank.load(files / "base", {"cat": files / "unlearned" / "cat", "dog": files / "unlearned" / "dog"})
    protocol = gf.Protocol.from_scheduler(bank.scheduler, start=5, stride=20)
    expected = gf.attribute(files / "queries", bank, protocol)
    found = gf.Attribution.from_parquet(tmp_path / "scores")
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.groups == ("cat", "dog") and found.queries == ("0.png", "1.png", "2.png")
    assert (tmp_path / "scores" / "scores.csv").read_text().startswith("query,query_id,cat,dog")
    best = expected.top(1)[0][0]
    assert f"0.png   {best.group}  {best.score:.4g} +-" in printed


def test_named_groups_in_the_given_order(files, run, tmp_path) -> None:
    torch.save(perturbed(tiny_unet(), 0.01, 2).state_dict(), tmp_path / "dog.pt")
    group = ["--group", "the dog=dog.pt", "--group", f"a=b cat={files / 'unlearned' / 'cat'}"]
    code, printed = run("score", files / "queries", "--base", files / "base", *group[:2], "--start", 5)
    assert code == 0, printed
    assert gf.Attribution.from_parquet("scores").groups == ("the dog",)
    code, printed = run("score", files / "queries", "--base", files / "base", *group, "--force")
    assert code == 1 and "b cat=" in printed  # NAME ends at the first =


def test_run_json_replays_the_run(files, run, tmp_path, monkeypatch) -> None:
    run(*score_arguments(files, "--samples", 2, "--antithetic", "--seed", 7))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, printed = run("score", "--config", "../scores/run.json", "--out", "../again")
    monkeypatch.chdir(tmp_path)
    assert code == 0, printed
    first, again = (gf.Attribution.from_parquet(name) for name in ("scores", "again"))
    np.testing.assert_array_equal(first.scores, again.scores)
    assert {**first.provenance, "seconds": None} == {**again.provenance, "seconds": None}
    code, printed = run("score", "--config", "scores/run.json", "--out", "other", "--seed", 8)
    assert json.loads(Path("other/run.json").read_text())["protocol"]["seed"] == 8


def test_a_result_is_not_overwritten_by_accident(files, run) -> None:
    assert run(*score_arguments(files))[0] == 0
    code, printed = run(*score_arguments(files))
    assert code == 1 and "--out: scores must not hold a result already" in printed
    assert run(*score_arguments(files, "--force"))[0] == 0


def test_dry_run_prints_the_cost_and_writes_nothing(files, run, tmp_path) -> None:
    code, printed = run(*score_arguments(files, "--dry-run"))
    assert code == 0, printed
    assert "forwards     45 rows" in printed  # 3 queries x 5 draws x (2 groups + base)
    for line in ("FLOPs ", "memory ", "precision    fp32", "plan         ", "time         about"):
        assert line in printed
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize("plan", ["swap", "batched"])
def test_dry_run_prints_the_plan_that_was_asked_for(files, run, plan: str) -> None:
    code, printed = run(*score_arguments(files, "--dry-run", "--plan", plan))
    assert code == 0 and f"plan         {plan}: it was asked for" in printed
    assert ("the deltas of all groups" in printed) == (plan == "batched")


def damage(files: Path, folder: Path, how: str) -> list[object]:
    """A copy of the files with one thing wrong, and the command line for it."""
    shutil.copytree(files, folder / "copy")
    copy = folder / "copy"
    weights = copy / "unlearned" / "cat" / "diffusion_pytorch_model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "text image":
        (copy / "queries" / "1.png").write_text("this is no image")
    elif how == "large image":
        Image.new("L", (9, 8)).save(copy / "queries" / "1.png")
    elif how == "identical":
        shutil.copy(copy / "base" / "unet" / weights.name, weights)
    elif how == "no queries":
        shutil.rmtree(copy / "queries")
        (copy / "queries").mkdir()
    return score_arguments(copy)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "unlearned/cat/diffusion_pytorch_model.safetensors"),
        ("text image", "queries/1.png: must be an image"),
        ("large image", "query 1.png must have 1 x 8 x 8 .* found 1 x 8 x 9"),
        ("identical", "unlearned/cat.*equals the base"),
        ("no queries", "queries must hold at least one query"),
    ],
)
def test_damaged_input_is_named_and_nothing_is_written(files, run, tmp_path, how, message) -> None:
    code, printed = run(*damage(files, tmp_path, how))
    assert code == 1
    assert "guda-fast: error:" in printed and "Traceback" not in printed
    assert re.search(message, printed), printed
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--start", "100"], "start must be between 0 and 99, got 100"),
        (["--weighting", "ebo"], "weighting must be one of 'elbo'"),
        (["--precision", "half"], "precision must be one of 'fp64', 'fp32'"),
        (["--group", "cat"], "--group: must be NAME=PATH, got 'cat'"),
        (["--group", "cat=x"], "--groups: names must differ, also from those of --group, got 'cat' twice"),
        (["--device", "gpu"], "device must be a device such as 'cpu'"),
        (["--out", __file__], "--out: must be a folder that can be written, found"),
        (["--groups", "nowhere"], "--groups: must be a folder, found no folder nowhere"),
        (["--scheduler", "nowhere.json"], "nowhere.json"),
    ],
)
def test_typos_are_named(files, run, extra, message) -> None:
    code, printed = run(*score_arguments(files, *extra))
    assert code == 1 and message in printed and "Traceback" not in printed


def test_no_groups_and_a_foreign_config(files, run, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    code, printed = run("score", files / "queries", "--base", files / "base", "--groups", "empty")
    assert code == 1 and "must name at least one unlearned model, got none; empty has no sub-folder" in printed
    (tmp_path / "x.json").write_text("{}")
    code, printed = run("score", "--config", "x.json")
    assert code == 2 and "x.json must be the run.json of a score run" in printed.replace("\n", " ")


def test_help_version_and_unknown_commands(run) -> None:
    assert run("--version") == (0, f"guda_fast {gf.__version__}\n")
    assert run("--help")[0] == 0
    assert run("scores")[0] == 2


def test_doctor_reports_every_backend(run) -> None:
    code, printed = run("doctor")
    assert code == 0
    for word in ("guda_fast", "torch", "add_noise on cpu: reference", "denoising_error on cpu: cpp", "nvcc"):
        assert word in printed


def test_weight_files_in_the_groups_folder_are_groups_too(files, run, tmp_path) -> None:
    shutil.copytree(files / "unlearned" / "cat", tmp_path / "unlearned" / "cat")
    torch.save(perturbed(tiny_unet(), 0.01, 2).state_dict(), tmp_path / "unlearned" / "dog.pt")
    (tmp_path / "unlearned" / "notes.txt").write_text("not a model")
    code, printed = run("score", files / "queries", "--base", files / "base", "--groups", "unlearned")
    assert code == 0, printed
    assert gf.Attribution.from_parquet("scores").groups == ("cat", "dog")


def test_choices_after_a_path_and_their_replay(files, run, tmp_path, monkeypatch) -> None:
    """A part by name, and in a folder with a comma in its name."""
    state = perturbed(tiny_unet(), 0.01, 2).state_dict()
    (tmp_path / "a,b=c").mkdir()
    torch.save({name: state[name] for name in list(state)[1:]}, tmp_path / "a,b=c" / "dog.pt")
    common = ["score", files / "queries", "--base", files / "base", "--start", 5, "--stride", 40]
    code, printed = run(*common, "--group", "dog=a,b=c/dog.pt")
    assert code == 1 and "or PATH,format=partial to a command" in printed
    code, printed = run(*common, "--group", "dog=a,b=c/dog.pt,format=partial,weights=raw")
    assert code == 0, printed
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, printed = run("score", "--config", "../scores/run.json", "--out", "../again")
    assert code == 0, printed
    first, again = (gf.Attribution.from_parquet(tmp_path / name) for name in ("scores", "again"))
    np.testing.assert_array_equal(first.scores, again.scores)
    (kept,) = json.loads((tmp_path / "again" / "run.json").read_text())["config"]["group"]
    assert kept == f"dog={tmp_path}/a,b=c/dog.pt,format=partial,weights=raw"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("cat=x,scale=twice", "--group: cat: could not convert string to float: 'twice'"),
        ("cat=x,weights=best", "--group: cat: Source: weights must be one of 'raw', 'ema', got 'best'"),
        ("cat=x,scale=1,scale=2", "cat: must have scale= once"),
        ("cat=,scale=1", "--group: must be NAME=PATH, got 'cat=,scale=1'"),
        ("cat=x,fromat=partial", "what follows a path must be one of format, weights, scale, variant, got 'fromat'"),
        ("cat=here,scale=1", "must say one thing, got 'cat=here,scale=1', whose choices are part of a file's name too"),
    ],
)
def test_choices_that_cannot_be_read_are_named(files, run, tmp_path, entry: str, message: str) -> None:
    (tmp_path / "here,scale=1").touch()
    code, printed = run("score", files / "queries", "--base", files / "base", "--group", entry)
    assert code == 1 and message in " ".join(printed.split()) and "Traceback" not in printed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bird.pkl", "--groups: weights must end with one of .safetensors, .pt, .pth, .bin, .ckpt, found weights in"),
        ("bird.pth.tar", "found weights in unlearned/bird.pth.tar"),
        ("model-00001-of-00003.safetensors", "--groups: must hold whole models, found unlearned/model-00001-of-00003"),
    ],
)
def test_files_in_the_groups_folder_that_are_no_groups_are_named(files, run, tmp_path, name, message) -> None:
    (tmp_path / "unlearned").mkdir()
    torch.save(perturbed(tiny_unet(), 0.01, 2).state_dict(), tmp_path / "unlearned" / "dog.pth")
    common = ["score", files / "queries", "--base", files / "base", "--groups", "unlearned"]
    code, printed = run(*common, "--dry-run")
    assert code == 0 and "forwards" in printed, printed
    shutil.copy(tmp_path / "unlearned" / "dog.pth", tmp_path / "unlearned" / name)
    code, printed = run(*common)
    assert code == 1 and message in printed


def test_a_misspelt_choice_after_a_path_is_named(files, run) -> None:
    model = files / "unlearned" / "cat"
    code, printed = run("score", files / "queries", "--base", files / "base", "--group", f"cat={model},wieghts=ema")
    printed = " ".join(printed.split())
    assert code == 1 and "what follows a path must be one of format, weights, scale, variant, got 'wieghts'" in printed


def test_a_plan_that_cannot_run_is_said_in_one_line(files, run, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*arguments: object, **options: object) -> None:
        raise gf.BatchedUnavailableError("key 'x' must belong to a layer")

    monkeypatch.setattr("guda_fast.forward.batched_plan.BatchedModel", unavailable)
    code, printed = run(*score_arguments(files, "--plan", "batched"))
    assert code == 1 and "guda-fast: error: key 'x' must belong to a layer" in printed and "Traceback" not in printed
