"""The UnlearnCanvas frontend against a plain script, on a tiny Stable Diffusion saved by diffusers."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import guda_fast as gf
from canvas_cases import STYLES, folder, one_thread
from guda_fast.frontends import unlearncanvas
from reference_scorers.unlearncanvas import Scorer

__all__ = ["folder", "one_thread"]
TOLERANCE = 5e-4  # of the largest score, as for CIFAR
SHORT = ["--min_timestep", "10", "--max_timestep", "95", "--timestep_stride", "20"]
TIMESTEPS = list(range(10, 96, 20))


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> list[str]:
    paths = {
        "model": folder / "model",
        "allclass_dir": folder / "all",
        "retrack_dir": folder / "unlearned",
        "image_dir": folder / "images",
        "eval_prompts_file": folder / "prompts.jsonl",
        "output_dir": tmp_path,
    }
    steps = ["--checkpoint_step", "300", "--retrack_checkpoint_step", "200", "--precision", "fp32"]
    return [*(word for name, path in paths.items() for word in (f"--{name}", str(path))), *steps, *SHORT]


def without(options: list[str], name: str) -> list[str]:
    place = options.index(name)
    return options[:place] + options[place + 2 :]


def rows_of(path: Path) -> list[list[str]]:
    content = path.read_bytes()
    assert content.count(b"\r\n") == content.count(b"\n") > 0
    return list(csv.reader(content.decode().splitlines()))


def check_same(found: Path, expected: Path) -> None:
    ours, theirs = rows_of(found), rows_of(expected)
    assert ours[0] == theirs[0]
    assert [row[:3] + row[4:] for row in ours] == [row[:3] + row[4:] for row in theirs]
    wanted = np.array([float(row[3]) for row in theirs[1:]])
    assert len(wanted) == len(STYLES) ** 2 * 2 and np.abs(wanted).min() > 0
    np.testing.assert_allclose([float(row[3]) for row in ours[1:]], wanted, rtol=0, atol=TOLERANCE * abs(wanted).max())


@pytest.mark.parametrize(("samples", "noise_dtype"), [(1, "bf16"), (2, "fp32")])
def test_the_reference_mode_gives_the_scripts_csv(folder, options, tmp_path, samples, noise_dtype) -> None:
    noise = ["--noise", "reference", "--noise_dtype", noise_dtype, "--num_noise_samples", str(samples)]
    unlearncanvas.main([*options, *noise, "--batch_size", "5"])
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[noise_dtype]
    arguments = (folder / "model", folder / "images", folder / "prompts.jsonl")
    scorer = Scorer(*arguments, timesteps=TIMESTEPS, samples=samples, noise_dtype=dtype)
    groups = {style: folder / f"unlearned/{style}/checkpoint_step_200.pt" for style in STYLES}
    groups["Cubism"] = folder / "unlearned/Cubism/checkpoint_step_200"
    base = folder / "all/checkpoint_step_300.pt"
    scorer.write_scores(tmp_path / "wanted.csv", base, groups, "una_score", batch=4)
    check_same(tmp_path / "una_retrack_scores.csv", tmp_path / "wanted.csv")


def test_logo_models_and_a_base_in_a_folder(folder, options, tmp_path) -> None:
    logo = ["--logo_dir", str(folder / "logo"), "--checkpoint_step", "301", "--noise", "reference"]
    unlearncanvas.main([*without(options, "--retrack_dir"), *logo])
    arguments = (folder / "model", folder / "images", folder / "prompts.jsonl")
    scorer = Scorer(*arguments, timesteps=TIMESTEPS, noise_dtype=torch.float32)
    groups = {style: folder / f"logo/{style}/checkpoint-301" for style in STYLES}
    scorer.write_scores(tmp_path / "wanted.csv", folder / "all/checkpoint-301", groups, "logoa_score")
    check_same(tmp_path / "logoa_scores.csv", tmp_path / "wanted.csv")


def test_contract_noise_is_attributes(folder, options, tmp_path) -> None:
    unlearncanvas.main([*options, "--output_filename", "contract.csv", "--styles", "Warm Smear", "Blue Ink"])
    rows = rows_of(tmp_path / "contract.csv")
    assert [row[2] for row in rows[1:]] == ["Blue Ink"] * 6 + ["Warm Smear"] * 6
    assert rows[1][4] == "Blue Ink/Blue_Ink_Cat.png" and rows[2][1] == "Two_Trees"
    found = np.array([float(row[3]) for row in rows[1:]]).reshape(2, -1)
    groups = {style: folder / f"unlearned/{style}/checkpoint_step_200.pt" for style in ("Blue Ink", "Warm Smear")}
    bank = gf.DeltaBank.load(folder / "all/checkpoint-301", groups, scheduler=folder / "model/scheduler")
    protocol = gf.Protocol.from_scheduler(bank.scheduler, start=10, stop=96, stride=20)
    images = sorted((folder / "images").glob("*/*.png"))
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    model = folder / "model"
    expected = gf.attribute(
        images, bank, protocol, conditions=gf.TextEncoder(model)(prompts), latents=gf.Latents(model)
    ).scores
    # beta_t of float32 quotients of alpha_bar: an ulp of 6e-8 in about 1 of a beta of at least 9e-4.
    np.testing.assert_allclose(found.T, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_sampled_latents_depend_on_the_image_alone(folder, options, monkeypatch) -> None:
    """And not on its place, as reference noise does."""
    made: list[torch.Tensor] = []

    def queries(self: object, x0: torch.Tensor, *_: object, **__: object) -> None:
        made.append(x0)
        raise InterruptedError

    monkeypatch.setattr(gf.forward.Engine, "queries", queries)
    for noise in ("contract", "reference"):
        with pytest.raises(InterruptedError):
            unlearncanvas.main([*options, "--latents", "sample", "--noise", noise])
    torch.testing.assert_close(*made, rtol=0, atol=0)
    assert len(made[0]) == 2 * len(STYLES)


def test_missing_models_are_errors_or_left_out(folder, options, tmp_path, capsys) -> None:
    (tmp_path / "models").mkdir()
    for style in STYLES[:2]:
        (tmp_path / "models" / style).symlink_to(folder / "unlearned" / style)
    (tmp_path / "models" / STYLES[2]).mkdir()
    options = [*without(options, "--retrack_dir"), "--retrack_dir", str(tmp_path / "models")]
    with pytest.raises(FileNotFoundError, match=r"Warm Smear/checkpoint_step_200.pt: must be the model of group"):
        unlearncanvas.main(options)
    unlearncanvas.main([*options, "--skip-missing"])
    assert "skipped: group 'Warm Smear' has no model at" in capsys.readouterr().out
    assert {row[2] for row in rows_of(tmp_path / "una_retrack_scores.csv")[1:]} == set(STYLES[:2])


def test_wrong_options_and_files_are_named(folder, options, tmp_path, capsys) -> None:
    stray = tmp_path / "images/Cubism"
    stray.mkdir(parents=True)
    (stray / "Cat.png").write_bytes(b"")
    broken, partial = tmp_path / "broken.jsonl", tmp_path / "partial.jsonl"
    broken.write_text('{"style": "Cubism"}\n')
    partial.write_text((folder / "prompts.jsonl").read_text().partition("\n")[2])
    for changed, message in (
        (["--logo_dir", str(folder / "logo")], "--retrack_dir or --logo_dir: exactly one of them must be given"),
        (["--retrack_dir", str(tmp_path / "no")], "no: must be a folder with one sub-folder a style"),
        (["--styles", "Fresco"], "Fresco/checkpoint_step_200.pt: must be the model of group 'Fresco'"),
        (["--checkpoint_step", "1"], "all: must hold the base as checkpoint_step_1.pt, as a folder checkpoint-1/"),
        (["--image_dir", str(tmp_path / "no")], "--image_dir: must be a folder with one sub-folder a style"),
        (["--image_dir", str(folder / "model")], "--image_dir: must hold images <Style>/<Style>_<Object>.png"),
        (["--image_dir", str(tmp_path / "images")], "Cubism/Cat.png: must be called Cubism_<Object>.png"),
        (["--eval_prompts_file", str(broken)], "broken.jsonl, line 1: must "),
        (["--eval_prompts_file", str(partial)], "partial.jsonl: must have the prompt of .*Blue_Ink_Cat.png"),
        (["--model", str(folder)], "--model: must hold the scheduler's configuration, found no file"),
        (["--min_timestep", "0"], "--min_timestep must be between 1 and 999, got 0"),
        (["--max_timestep", "1000"], "--max_timestep must be between 10 and 999, got 1000"),
        (["--timestep_stride", "0"], "--timestep_stride must be at least 1, got 0"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            unlearncanvas.main([*options, *changed])
    with pytest.raises(SystemExit, match="2"):
        unlearncanvas.main([*options, "--max_time", "9"])
    assert "--max_time" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.csv"))


def test_a_damaged_checkpoint_is_named(folder, options, tmp_path) -> None:
    shutil.copytree(folder / "unlearned", tmp_path / "models")
    file = tmp_path / "models/Blue Ink/checkpoint_step_200.pt"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(gf.CheckpointError, match=r"Blue Ink/checkpoint_step_200.pt: damaged or truncated"):
        unlearncanvas.main([*options, "--retrack_dir", str(tmp_path / "models")])
    assert not list(tmp_path.glob("*.csv"))
