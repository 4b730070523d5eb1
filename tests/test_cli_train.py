"""guda-fast train, as typed: a pipeline folder that everything else reads, and what a typo says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import guda_fast as gf
from guda_fast.deltas.base import open_base
from series import network_file


@pytest.fixture
def train(run, tmp_path):
    """Runs guda-fast train on the digits with a tiny network."""
    network = network_file(tmp_path)

    def train(*extra: object) -> tuple[int, str]:
        return run("train", "--data", "digits", "--network", network, "--device", "cpu", *extra)

    return train


def test_a_base_is_a_pipeline_with_its_recipe(train, tmp_path) -> None:
    code, printed = train("--out", "runs/full", "--steps", 2, "--set", "ema_decay=null", "--seed", 3)
    assert code == 0 and "1 of 1 finished (0 before)" in printed, printed
    assert [path.name for path in Path("runs").iterdir()] == ["full"], "nothing hidden is left"
    record = json.loads(Path("runs/full/training.json").read_text())
    settings = record["settings"]
    assert (settings["steps"], settings["seed"], settings["ema_decay"], settings["batch_size"]) == (2, 3, None, 64)
    assert json.loads(Path("runs/full/manifest.json").read_text())["groups"]["3"]["count"] == 183
    assert (Path("runs/full") / "log.jsonl").is_file()
    base = open_base("runs/full", None)
    assert base.scheduler is not None and base.scheduler["beta_schedule"] == "squaredcos_cap_v2"

    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained("runs/full", local_files_only=True, low_cpu_mem_usage=False)
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(value, base.model.state_dict()[name])


def test_the_same_command_again_does_nothing_and_another_is_refused(train) -> None:
    train("--out", "base", "--steps", 2)
    before = Path("base/training.json").stat().st_mtime_ns
    code, printed = train("--out", "base", "--steps", 2)
    assert code == 0 and "1 of 1 finished (1 before)" in printed
    assert Path("base/training.json").stat().st_mtime_ns == before
    code, printed = train("--out", "base", "--steps", 3)
    assert code == 1 and "base/training.json: was made with other settings (steps: wanted 3, found 2)" in printed


def test_data_with_labels_make_a_conditional_base(run, tmp_path) -> None:
    data = ("--data", "digits,conditions=labels,null=yes", "--network", network_file(tmp_path))
    code, printed = run("train", *data, "--out", "base", "--steps", 2, "--label-dropout", 0.1)
    assert code == 0, printed
    assert open_base("base", None).config["num_class_embeds"] == 11
    code, printed = run("train", "--data", "digits", "--out", "other", "--steps", 2, "--label-dropout", 0.1)
    assert code == 1 and "label_dropout: must come with data that have a null condition" in printed


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--data", "dogs"), "spec must begin with one of digits"),
        (("--network", "unet"), "network: must be one of digits, small, ddpm-cifar10"),
        (("--set", "lr"), "--set: must be KEY=VALUE, got 'lr'"),
        (("--set", "lr=1", "--set", "lr=2"), "--set: keys must differ, got lr twice"),
        (("--set", "lr=fast"), "TrainConfig: lr must be a real number, got 'fast'"),
        (("--set", "speed=1"), "train: settings must be among steps, lr, weight_decay, "),
        (("--set", "seed=5"), "--set: must not be seed, which has an option of its own, --seed"),
        (("--set", "steps=5"), "--set: must not be steps, which has an option of its own, --steps"),
        (("--device", "cpu"), "--device: must be given once for one model, got cpu, cpu"),
    ],
)
def test_what_a_typo_says(train, extra, message) -> None:
    code, printed = train("--out", "base", *extra)
    assert code == 1 and message in printed and "Traceback" not in printed
    assert not Path("base").exists()


def test_pictures_that_the_network_cannot_halve_are_refused(train, tmp_path) -> None:
    for number in range(2):
        path = tmp_path / "pictures" / f"{number}" / "a.png"
        path.parent.mkdir(parents=True)
        Image.new("L", (9, 9), 50 * number).save(path)
    code, printed = train("--data", f"{tmp_path / 'pictures'}", "--out", "base")
    assert code == 1 and not Path("base").exists() and "Traceback" not in printed
    assert "must take the data's 1x9x9 images, whose height and width must be multiples of 2, found that" in printed


@pytest.mark.parametrize("out", [".", "../made/none/.."])
def test_an_empty_folder_is_taken_however_it_is_named(train, tmp_path, monkeypatch, out) -> None:
    target = tmp_path / "made"
    target.mkdir()
    monkeypatch.chdir(target)
    code, printed = train("--out", out, "--steps", 2)
    assert code == 0, printed
    assert (target / "training.json").is_file()


def test_a_diverging_loss_is_said_and_nothing_half_made_is_named_as_finished(train) -> None:
    code, printed = train("--out", "base", "--steps", 30, "--set", "lr=1e30", "--set", "grad_clip=null")
    assert code == 1 and "guda-fast: error: base: " in printed and "finite" in printed
    assert not Path("base").exists()


def test_dry_run_says_what_it_costs_and_makes_nothing(train) -> None:
    code, printed = train("--out", "base", "--steps", 7, "--dry-run")
    assert code == 0, printed
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines() if line[:1].isalpha())
    assert lines["runs"].startswith("1 of 1") and lines["steps"] == "7"
    assert lines["forwards"] == f"{7 * 64} rows in training, 0 of the frozen base"
    assert float(lines["FLOPs"]) > 0 and lines["time"].startswith("about") and "MiB" in lines["memory"]
    assert not Path("base").exists()


def test_two_bases_make_a_bank(train) -> None:
    train("--out", "base", "--steps", 1)
    train("--out", "models/other", "--steps", 1, "--seed", 1)
    bank = gf.DeltaBank.load("base", {"other": "models/other"})
    assert bank.survey("other").kind == "dense"
