"""What the CIFAR frontend refuses, and its cache of the base's errors."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import guda_fast as gf
from cifar_cases import BATCH, IMAGES, LOW, images, models, one_thread, rows_of, unlearned
from guda_fast.frontends import cifar10
from guda_fast.frontends.base_cache import BaseCache
from reference_scorers import cifar10 as reference
from tiny import perturbed, tiny_unet

__all__ = ["images", "models", "one_thread"]
ONE = ["--single_class_mode"]


@pytest.fixture
def options(models: Path, images: Path, tmp_path: Path) -> list[str]:
    """A run of one class in the script's noise."""
    model = models / "unlearned/unlearn_class_4/latest"
    return [*unlearned(models, images, tmp_path, *LOW, *ONE, "--noise", "reference"), "--ckpt_unlearned", str(model)]


def scores_of(path: Path) -> np.ndarray:
    return np.array([float(row[2]) for row in rows_of(path)[1:]])


def test_a_cache_is_written_and_then_read(options, tmp_path, monkeypatch) -> None:
    cache = tmp_path / "new/cache.npz"
    options = [*options, "--base_elbo_cache", str(cache)]
    cifar10.main(options)
    first = scores_of(tmp_path / "delta_elbo_unlearned.csv")
    with np.load(cache, allow_pickle=False) as file:
        assert file["kl_base"].shape == (IMAGES, 5) and file["kl_base"].dtype == np.float32
        assert file["timesteps"].tolist() == [50, 40, 30, 20, 10] and file["seed"] == 42
        assert [Path(path).name for path in file["image_paths"]] == [f"image_{i:04d}.png" for i in range(IMAGES)]
        config = json.loads(str(file["config"]))
        assert (config["noise"], config["device"], config["torch"]) == ("reference", "cpu", str(torch.__version__))
    models_run: list[int] = []
    errors = gf.forward.Engine.errors
    monkeypatch.setattr(
        gf.forward.Engine,
        "errors",
        lambda self, queries, rows, *rest: models_run.extend(rows.model.tolist()) or errors(self, queries, rows, *rest),
    )
    cifar10.main([*options, "--out_csv", "again.csv"])
    assert set(models_run) == {1}
    # Each of the base's errors was rounded to float32.
    with np.load(cache) as file:
        rounding = 5 * 6e-8 * np.abs(file["kl_base"]).max()
    np.testing.assert_allclose(scores_of(tmp_path / "again.csv"), first, atol=rounding, rtol=1e-6)
    # A generator that gives other values, as that of another device does.
    monkeypatch.setattr(cifar10, "batch_seed", lambda first, seed: 1)
    with pytest.raises(gf.CheckpointError, match=r"cache.npz: noise_of in key 'config' must be \[3, '"):
        cifar10.main(options)


def test_a_cache_that_cannot_be_written_does_not_cost_the_scores(options, tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BaseCache, "write", full)
    with pytest.raises(OSError, match="No space left"):
        cifar10.main([*options, "--base_elbo_cache", str(tmp_path / "cache.npz")])
    assert np.isfinite(scores_of(tmp_path / "delta_elbo_unlearned.csv")).all()
    assert (tmp_path / "delta_elbo_unlearned_sorted.csv").is_file()


def test_places_to_write_are_tried_before_models_are_read(options, images, monkeypatch) -> None:
    monkeypatch.setattr(gf.DeltaBank, "load", lambda *_: pytest.fail("too late"))
    place = images / "image_0000.png"
    with pytest.raises(OSError, match="--output_dir: must be a path that can be written, found File exists"):
        cifar10.main([*options, "--output_dir", str(place)])
    with pytest.raises(OSError, match="--base_elbo_cache: must be a path that can be written, found File exists"):
        cifar10.main([*options, "--base_elbo_cache", str(place / "cache.npz")])


def test_an_epoch_in_single_class_mode_is_a_sub_folder(models, options) -> None:
    model = models / "unlearned/unlearn_class_4"
    for given in (model, model / "latest"):
        words = [*options, "--ckpt_unlearned", str(given), "--ckpt_epoch", "latest"]
        assert cifar10.find_models(cifar10.parser().parse_args(words)).groups == {"4": model / "latest"}
    parsed = cifar10.parser().parse_args([*options, "--ckpt_epoch", "epoch_9"])
    with pytest.raises(FileNotFoundError, match="unlearn_class_4/latest/epoch_9: must be the folder of the unlearned"):
        cifar10.find_models(parsed)


def test_a_cache_of_the_scripts_writer_is_read_where_its_noise_is_ours(options, models, images, tmp_path) -> None:
    cifar10.main(options)
    expected = scores_of(tmp_path / "delta_elbo_unlearned.csv")
    scorer = reference.Scorer(models / "base", timesteps=4000, max_t=50)
    paths = reference.find_images(images)
    scorer.write_cache(tmp_path / "same.npz", paths, batch=BATCH)
    cifar10.main([*options, "--base_elbo_cache", str(tmp_path / "same.npz"), "--out_csv", "cached.csv"])
    found = scores_of(tmp_path / "cached.csv")
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4 * np.abs(expected).max())
    scorer.write_cache(tmp_path / "other.npz", paths, batch=2)
    with pytest.raises(gf.CheckpointError, match=r"other.npz: key 'kl_base' must be of this base, seed and batch size"):
        cifar10.main([*options, "--base_elbo_cache", str(tmp_path / "other.npz")])


class Canary:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("canary",)


def test_a_pickle_in_a_cache_is_never_run(options, models, images, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    scorer = reference.Scorer(models / "base", timesteps=4000, max_t=50)
    scorer.write_cache(tmp_path / "cache.npz", reference.find_images(images), batch=BATCH)
    with np.load(tmp_path / "cache.npz", allow_pickle=True) as file:
        content = {key: file[key] for key in file.files if key != "config"}
    np.savez(tmp_path / "cache.npz", **content, config=np.array(Canary(), dtype=object))
    cifar10.main([*options, "--base_elbo_cache", str(tmp_path / "cache.npz")])
    content["image_paths"] = np.array(Canary(), dtype=object)
    np.savez(tmp_path / "cache.npz", **content)
    with pytest.raises(
        gf.CheckpointError, match="cache.npz: key 'image_paths' must have shape .* and kind U, found object"
    ):
        cifar10.main([*options, "--base_elbo_cache", str(tmp_path / "cache.npz")])
    assert not (tmp_path / "canary").exists()
    # As numpy itself would run it.
    pickle.loads(pickle.dumps(Canary()))  # noqa: S301
    assert (tmp_path / "canary").exists()


def test_a_cache_of_something_else_is_refused(options, tmp_path) -> None:
    cache = tmp_path / "cache.npz"
    options = [*options, "--base_elbo_cache", str(cache)]
    cifar10.main(options)
    before = cache.read_bytes()
    for changed, message in (
        (["--seed", "7"], "key 'seed' must be 7, found 42"),
        (["--max_t", "40"], r"key 'timesteps' must have shape \(4,\) .* found int64 of shape \(5,\)"),
        (["--batch", "4"], r"noise_of in key 'config' must be \[4, '\w+'\], found \[3, '\w+'\]"),
        (["--noise", "contract"], "noise in key 'config' must be contract, found reference"),
        (["--precision", "fp64"], "precision in key 'config' must be fp64, found fp32"),
    ):
        with pytest.raises(gf.CheckpointError, match=f"cache.npz: {message}"):
            cifar10.main([*options, *changed])
    assert cache.read_bytes() == before


def test_wrong_options_are_named(options, models, images, tmp_path, capsys) -> None:
    for changed, message in (
        (["--gen_dir", str(tmp_path / "none")], "--gen_dir: must be a folder of images, found no folder"),
        (["--gen_dir", str(models)], "--gen_dir: must hold images image_"),
        (["--ckpt_base", str(tmp_path / "none")], "none: must be the folder of the base model"),
        (["--ckpt_all", str(models / "base")], "--ckpt_unlearned or --ckpt_all: exactly one of them must be given"),
        (["--ckpt_unlearned", str(models / "base")], "--ckpt_unlearned: must have class_<k> with k below 10 in its"),
        (["--ckpt_unlearned", "class_12"], "--ckpt_unlearned: must have class_<k> with k below 10"),
        (["--ckpt_unlearned", "class_1"], "class_1: must be the folder of the unlearned model"),
        (["--timesteps", "4001"], "--timesteps must be between 2 and 4000, got 4001"),
        (["--min_t", "0"], "--min_t must be at least 1, got 0"),
        (["--skip", "0"], "--skip must be at least 1, got 0"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--max_t", "9"], "--min_t and --max_t: must leave a multiple of 10, got 1 and 9"),
        (["--out_csv", "scores"], "--out_csv: must end in .csv, got 'scores'"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            cifar10.main([*options, *changed])
    for typo in (["--timestep", "10"], ["--noise", "torch"], ["--batch", "many"]):
        with pytest.raises(SystemExit, match="2"):
            cifar10.main([*options, *typo])
        assert typo[0] in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.csv"))


def test_damaged_files_are_named_and_nothing_is_written(options, models, images, tmp_path) -> None:
    bad = tmp_path / "images"
    bad.mkdir()
    whole = (images / "image_0000.png").read_bytes()
    (bad / "image_0000.png").write_bytes(whole)
    (bad / "image_0001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="image_0001.png: must be a whole image, found a damaged file"):
        cifar10.main([*options, "--gen_dir", str(bad)])
    model = tmp_path / "unlearn_class_1"
    for source in (models / "base").iterdir():
        (tmp_path / "unlearn_class_1").mkdir(exist_ok=True)
        (model / source.name).write_bytes(source.read_bytes())
    weights = model / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(gf.CheckpointError, match="diffusion_pytorch_model.safetensors: damaged or truncated"):
        cifar10.main([*options, "--ckpt_unlearned", str(model)])
    weights.write_bytes((models / "base" / weights.name).read_bytes())
    with pytest.raises(gf.CheckpointError, match="unlearn_class_1.*equals the base"):
        cifar10.main([*options, "--ckpt_unlearned", str(model)])
    assert not list(tmp_path.glob("**/*.csv"))


def test_the_scheduler_must_be_there_and_predict_noise(options, models, tmp_path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for source in (models / "base").iterdir():
        (base / source.name).write_bytes(source.read_bytes())
    config = json.loads((base / "scheduler_config.json").read_text())
    (base / "scheduler_config.json").write_text(json.dumps({**config, "prediction_type": "v_prediction"}))
    with pytest.raises(gf.CheckpointError, match="key 'prediction_type' of the scheduler must be 'epsilon'"):
        cifar10.main([*options, "--ckpt_base", str(base)])
    (base / "scheduler_config.json").unlink()
    with pytest.raises(gf.CheckpointError, match="base: must hold scheduler_config.json, found none"):
        cifar10.main([*options, "--ckpt_base", str(base)])


def test_a_delta_that_bfloat16_loses_is_refused_or_asked_for(options, models, tmp_path, capsys) -> None:
    model = tmp_path / "unlearn_class_5"
    # Weights of about 0.1 in steps of 2^-11: what is left of this delta is mostly rounding.
    perturbed(tiny_unet(3), 1e-5).save_pretrained(model)
    options = [*options, "--ckpt_unlearned", str(model), "--precision", "bf16"]
    with pytest.raises(gf.PrecisionError, match="precision must give the scores of fp32, got 'bf16'"):
        cifar10.main(options)
    assert not list(tmp_path.glob("*.csv"))
    cifar10.main([*options, "--allow_lossy"])
    assert "precision bf16: 7 queries at 5 draws" in capsys.readouterr().out
    assert np.isfinite(scores_of(tmp_path / "delta_elbo_unlearned.csv")).all()


@pytest.mark.slow
def test_the_command_says_what_is_wrong_in_one_line_and_has_help(options) -> None:
    command = [sys.executable, "-m", "guda_fast.frontends.cifar10"]
    done = subprocess.run([*command, *options, "--min_t", "0"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("python -m guda_fast.frontends.cifar10: error: ")
    assert "Traceback" not in done.stderr
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    options_of_the_script = (
        "gen_dir ckpt_base ckpt_unlearned ckpt_epoch out_csv output_dir batch timesteps skip min_t max_t seed "
        "base_elbo_cache single_class_mode ckpt_all"
    )
    own = "noise precision device plan allow_lossy skip-missing forward_batch"
    for name in f"{options_of_the_script} {own}".split():
        assert f"--{name}" in shown
    assert shown.startswith("usage: python -m guda_fast.frontends.cifar10")
