"""The CIFAR frontend against a plain script of the same description: the same CSV files, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import guda_fast as gf
from cifar_cases import BATCH, IMAGES, LOW, SPREAD, images, models, one_thread, rows_of, save_models, unlearned
from guda_fast.frontends import cifar10, scoring
from reference_scorers import cifar10 as reference

__all__ = ["images", "models", "one_thread"]
TOLERANCE = 5e-4  # of the largest score: what the design grants a script's posterior means in float32


def check_same(found: Path, expected: Path, at_least: float = 1) -> None:
    """The same rows in the same order, scores within the tolerance, and the same ranks where it decides them.

    at_least: how many ranks it must decide an image, in the mean
    """
    ours, theirs = rows_of(found), rows_of(expected)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    wanted = np.array([float(row[2]) for row in theirs[1:]])
    atol = TOLERANCE * np.abs(wanted).max()
    assert atol > 0
    np.testing.assert_allclose([float(row[2]) for row in ours[1:]], wanted, atol=atol, rtol=0)
    assert all(row[2] == repr(float(np.float32(row[2]))) for row in ours[1:])
    ours, theirs = (rows_of(path.with_name(f"{path.stem}_sorted.csv")) for path in (found, expected))
    assert ours[0] == theirs[0]
    decided = 0
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine[0] == other[0] and len(mine) == len(other)
        scores = np.array([float(text) for text in other[3::3]])
        np.testing.assert_allclose([float(text) for text in mine[3::3]], scores, atol=atol + 1e-4, rtol=0)
        for rank, gap in enumerate(-np.diff(scores)):
            if gap > 2 * (atol + 1e-4) and (rank == 0 or scores[rank - 1] - scores[rank] > 2 * (atol + 1e-4)):
                assert mine[1 + 3 * rank : 3 + 3 * rank] == other[1 + 3 * rank : 3 + 3 * rank]
                decided += 1
    assert decided >= at_least * (len(theirs) - 1)


def test_the_reference_mode_gives_the_scripts_csv(models, images, tmp_path) -> None:
    for options, settings in ((LOW, {"max_t": 50}), (SPREAD, {"skip": 700})):
        cifar10.main(unlearned(models, images, tmp_path, *options, "--noise", "reference"))
        scorer = reference.Scorer(models / "base", timesteps=4000, **settings)
        paths = reference.find_images(images)
        groups = {number: models / f"unlearned/unlearn_class_{number}/latest" for number in range(10)}
        reference.write_tables(tmp_path / "wanted.csv", paths, scorer.scores(paths, groups, batch=BATCH))
        check_same(tmp_path / "delta_elbo_unlearned.csv", tmp_path / "wanted.csv")


def test_six_channels_and_the_batched_plan(images, tmp_path) -> None:
    models = save_models(tmp_path / "models", 6)
    scorer = reference.Scorer(models / "base", timesteps=4000, max_t=50)
    paths = reference.find_images(images)
    groups = {number: models / f"unlearned/unlearn_class_{number}/latest" for number in range(10)}
    reference.write_tables(tmp_path / "wanted.csv", paths, scorer.scores(paths, groups, batch=BATCH))
    for plan in ("swap", "batched"):
        options = (*LOW, "--noise", "reference", "--plan", plan, "--out_csv", f"{plan}.csv", "--forward_batch", "5")
        cifar10.main(unlearned(models, images, tmp_path, *options))
        check_same(tmp_path / f"{plan}.csv", tmp_path / "wanted.csv")


def test_logo_models_have_options_and_a_file_of_their_own(models, images, tmp_path) -> None:
    options = ["--ckpt_all", str(models / "base"), "--ckpt_base", str(models / "logo"), "--gen_dir", str(images)]
    cifar10.main([*options, "--output_dir", str(tmp_path), *LOW, "--noise", "reference"])
    scorer = reference.Scorer(models / "base", timesteps=4000, max_t=50)
    paths = reference.find_images(images)
    groups = {number: models / f"logo/exclude_{number}/epoch_1200" for number in range(10)}
    reference.write_tables(tmp_path / "wanted.csv", paths, scorer.scores(paths, groups, batch=BATCH))
    check_same(tmp_path / "delta_elbo_loo.csv", tmp_path / "wanted.csv")


def test_single_class_mode_takes_one_model_and_writes_zeros(models, images, tmp_path) -> None:
    model = models / "unlearned/unlearn_class_7/latest"
    options = unlearned(models, images, tmp_path, *LOW, "--noise", "reference", "--single_class_mode")
    cifar10.main([*options, "--ckpt_unlearned", str(model)])
    scorer = reference.Scorer(models / "base", timesteps=4000, max_t=50)
    paths = reference.find_images(images)
    reference.write_tables(tmp_path / "wanted.csv", paths, scorer.scores(paths, {7: model}, batch=BATCH))
    check_same(tmp_path / "delta_elbo_unlearned.csv", tmp_path / "wanted.csv", at_least=0.5)  # nine classes have zeros
    rows = rows_of(tmp_path / "delta_elbo_unlearned.csv")[1:]
    assert {row[1] for row in rows if row[2] != "0.0"} == {"7"}


def test_contract_noise_is_attributes_and_the_same_for_every_batch_size(models, images, tmp_path) -> None:
    cifar10.main(unlearned(models, images, tmp_path, *LOW))
    found = np.array([float(row[2]) for row in rows_of(tmp_path / "delta_elbo_unlearned.csv")[1:]]).reshape(IMAGES, 10)
    groups = {str(number): models / f"unlearned/unlearn_class_{number}/latest" for number in range(10)}
    bank = gf.DeltaBank.load(models / "base", groups)
    protocol = gf.Protocol.from_scheduler(bank.scheduler, start=10, stop=51, stride=10)
    expected = gf.attribute(reference.find_images(images), bank, protocol).scores
    # The script's float32 alpha_bar moves its weights at t = 10 by up to 1.2e-3: an ulp of 6e-8 in 1 - alpha_bar.
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-3 * np.abs(expected).max())
    assert (found[1] == found[4]).all()
    cifar10.main(unlearned(models, images, tmp_path, *LOW[:-1], "64", "--out_csv", "other.csv"))
    other = [float(row[2]) for row in rows_of(tmp_path / "other.csv")[1:]]
    np.testing.assert_allclose(other, found.ravel(), rtol=0, atol=1e-5 * np.abs(found).max())


@pytest.mark.parametrize("rows", [1, 2 * BATCH * 5])
def test_scores_do_not_depend_on_how_many_rows_a_call_holds(models, images, tmp_path, monkeypatch, rows) -> None:
    options = unlearned(models, images, tmp_path, *LOW, "--noise", "reference", "--plan", "swap")
    cifar10.main([*options, "--out_csv", "whole.csv"])
    monkeypatch.setattr(scoring, "_ROWS", rows)
    cifar10.main([*options, "--out_csv", "tiles.csv"])
    rows_by_name = (rows_of(tmp_path / name)[1:] for name in ("whole.csv", "tiles.csv"))
    whole, tiles = (np.array([float(row[2]) for row in own]) for own in rows_by_name)
    # Forwards of other sizes round differently.
    np.testing.assert_allclose(tiles, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_a_missing_group_is_an_error_or_left_out_and_said(models, images, tmp_path, capsys) -> None:
    copy = tmp_path / "models"
    shutil.copytree(models / "unlearned", copy)
    shutil.rmtree(copy / "unlearn_class_2")
    options = unlearned(models, images, tmp_path, *SPREAD, "--ckpt_unlearned", str(copy))
    with pytest.raises(FileNotFoundError, match="unlearn_class_2/latest: must be the model of group '2'"):
        cifar10.main(options)
    assert not list(tmp_path.glob("*.csv"))
    cifar10.main([*options, "--skip-missing"])
    assert f"skipped: group '2' has no model at {copy}/unlearn_class_2/latest" in capsys.readouterr().out
    rows = rows_of(tmp_path / "delta_elbo_unlearned.csv")[1:]
    assert [row[1] for row in rows[:9]] == list("013456789") and len(rows) == 9 * IMAGES
    ranked = rows_of(tmp_path / "delta_elbo_unlearned_sorted.csv")
    assert len(ranked[0]) == 31 and all(row[-3:] == ["", "", ""] and row[-4] for row in ranked[1:])
