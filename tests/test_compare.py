"""guda-fast compare: results a method, reuse, costs, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

import guda_fast as gf
from conditional import classed
from guda_fast.baselines import pixel_similarity
from guda_fast.comparison import baseline
from guda_fast.datasets import open_dataset
from guda_fast.report.records import cost_table
from tiny import perturbed, tiny_unet

GROUPS = ("a", "b", "c")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, data (a folder a group), queries, and unlearned, logo-0 and logo-1 with a model a group."""
    folder = tmp_path_factory.mktemp("compared")
    base = tiny_unet()
    DDPMPipeline(base, DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder / "base")
    for seed, kind in enumerate(("unlearned", "logo-0", "logo-1")):
        for number, group in enumerate(GROUPS):
            perturbed(base, 0.01, 10 * seed + number + 1).save_pretrained(folder / kind / group)
    random = np.random.default_rng(0)
    for place, count in ((folder / "queries", 4), *((folder / "data" / group, 3) for group in GROUPS)):
        place.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(random.integers(0, 255, (8, 8), dtype=np.uint8)).save(place / f"{number}.png")
    return folder


@pytest.fixture
def files(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "files")
    return tmp_path / "files"


def words(files: Path, *extra: object) -> list[str]:
    oracles = ["--oracle", files / "logo-0", "--oracle", files / "logo-1"]
    given = ["compare", files / "queries", "--base", files / "base", "--data", f"{files / 'data'},channels=1", *oracles]
    return [str(word) for word in [*given, "--stride", 25, "--resamples", 100, "--out", files / "out", *extra]]


def test_every_method_has_its_result_and_its_cost(files, run) -> None:
    methods = ["--models", f"GUDA={files / 'unlearned'}", "--method", "pixels,reduce=max,name=nearest"]
    methods += ["--method", "query-unlearning,stride=50"]
    for group in GROUPS:
        (files / "unlearned" / group / "training.json").write_text('{"seconds": 1.5}')
    code, printed = run(*words(files, *methods))
    assert code == 0, printed
    names = ("GUDA", "nearest", "query-unlearning-stride-50")
    results = {name: gf.Attribution.from_parquet(files / "out" / "methods" / name) for name in names}
    data = open_dataset(f"{files / 'data'},channels=1")
    images = gf.Attribution.from_parquet(files / "out" / "methods" / "nearest")
    expected = gf.attribute(files / "queries", bank_of(files, "unlearned"), protocol_of(files))
    np.testing.assert_allclose(results["GUDA"].scores, expected.scores, rtol=1e-5, atol=1e-5)
    queries = gf.datasets.queries.load_queries(files / "queries", channels=1).x0
    np.testing.assert_array_equal(images.scores, pixel_similarity(queries, data, reduce="max"))
    with (files / "out" / "costs.csv").open() as file:
        costs = {row["method"]: row for row in csv.DictReader(file)}
    draws = expected.provenance["protocol"]
    assert costs["GUDA"]["forwards"] == str(4 * 4 * 4) and draws["timesteps"]
    assert (
        costs["nearest"]["forwards"] == "0"
        and costs["GUDA"]["making_s"] == "4.5"
        and costs["oracle 0"]["making_s"] == ""
    )
    assert set(costs) == {"oracle 0", "oracle 1", "GUDA", "nearest", "query-unlearning,stride=50"}
    assert "| GUDA |" in printed and "random" in printed


def bank_of(files: Path, kind: str) -> gf.DeltaBank:
    return gf.DeltaBank.load(files / "base", {group: files / kind / group for group in GROUPS})


def protocol_of(files: Path) -> gf.Protocol:
    return gf.Protocol.from_scheduler(files / "base" / "scheduler", start=10, stride=25)


def test_answers_are_used_again_until_what_they_depend_on_changes(files, run) -> None:
    pixels = ["--method", "pixels"]
    assert "pixels: as before" not in run(*words(files, *pixels))[1]
    code, printed = run(*words(files, *pixels, "--models", files / "unlearned"))
    assert code == 0 and printed.count("as before") == 3 and "unlearned: as before" not in printed
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(files / "queries" / "0.png")
    code, printed = run(*words(files, *pixels))
    assert code == 0 and "as before" not in printed
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(files / "data" / "a" / "0.png")
    assert "as before" not in run(*words(files, *pixels))[1]


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ([], "must name at least one method"),
        (["--method", "pixel"], "--method: must be one of pixels, unet"),
        (["--method", "pixels,reduces=max"], "choices must be KEY=VALUE with a key of reduce, k, got"),
        (["--method", "query-unlearning,stride=few"], "stride must be of type int, got 'few'"),
        (["--method", "pixels", "--method", "pixels"], "names of rows must differ"),
        (["--method", "pixels", "--models", "missing"], "found no folder missing"),
        (
            ["--method", "pixels,reduce=least"],
            "reduce must be one of mean, max, top-k, centroid, got 'least'",
        ),
        (["--method", "encoder"], "--method encoder: must have folder=, got none"),
        (["--method", "encoder,folder=missing"], "missing: must be a transformers folder with config.json"),
        (["--method", "trak,batch_size=0"], "batch_size must be at least 1"),
    ],
)
def test_what_is_wrong_is_said(files, run, extra, says) -> None:
    code, printed = run(*words(files, *extra))
    assert code == 1 and says in printed, printed
    assert not (files / "out" / "evaluation.md").exists()
    # What can be known beforehand is, for scores may take hours.
    assert (files / "out" / "methods").exists() == ("trak,batch_size=0" in extra)


def test_models_must_be_of_every_group_and_oracles_differ(files, run) -> None:
    shutil.rmtree(files / "unlearned" / "b")
    code, printed = run(*words(files, "--models", files / "unlearned"))
    assert code == 1 and "must have a model of every group, found none of 'b'" in printed
    code, printed = run(*words(files, "--method", "pixels", "--oracle", files / "logo-0"))
    assert code == 1 and "--oracle: folders must differ" in printed


def test_a_method_that_fails_leaves_the_others(files, run) -> None:
    code, _ = run(*words(files, "--method", "pixels", "--method", "trak,batch_size=0"))
    assert code == 1 and (files / "out" / "methods" / "pixels" / "run.json").exists()
    assert not (files / "out" / "methods" / "pixels-reduce-least").exists()


@pytest.mark.parametrize("name", ["unet", "trak", "d-trak", "das"])
def test_every_baseline_runs(files, run, name) -> None:
    few = "" if name == "unet" else ",timesteps=2"
    code, printed = run(*words(files, "--method", f"{name}{few},name={name}"))
    assert code == 0, printed
    result = gf.Attribution.from_parquet(files / "out" / "methods" / name)
    assert result.scores.shape == (4, 3) and np.isfinite(result.scores).all()
    forwards = (9 + 4) * (1 if name == "unet" else 3 * 2)  # data and queries; a backward pass is two
    assert result.provenance["forwards"] == {"used": forwards}
    shown = dict(cost_table(result))
    assert shown["forwards"] == f"{forwards:,}" and float(shown["seconds: scoring"]) > 0


def test_models_of_classes_are_compared_under_the_classes_of_the_images(files, run) -> None:
    base = classed(channels=1)
    DDPMPipeline(base, DDPMScheduler(num_train_timesteps=100)).save_pretrained(files / "base")
    for seed, kind in enumerate(("unlearned", "logo-0", "logo-1")):
        for number, group in enumerate(GROUPS):
            perturbed(base, 0.01, 10 * seed + number + 1).save_pretrained(files / kind / group)
    lines = [json.dumps({"file_name": f"{number}.png", "label": (1, 0, 2, 2)[number]}) for number in range(4)]
    (files / "queries.jsonl").write_text("\n".join(lines))
    few = ["trak,timesteps=2,name=trak", "unet", "query-unlearning,stride=50,name=queries"]
    given = [word for method in few for word in ("--method", method)]
    given += ["--models", files / "unlearned", "--conditions", files / "queries.jsonl"]
    told = words(files, *given)
    told[told.index("--data") + 1] += ",conditions=labels,null=yes"
    code, printed = run(*told)
    assert code == 0, printed
    found = {name: gf.Attribution.from_parquet(files / "out" / "methods" / name) for name in ("unlearned", "queries")}
    expected = gf.attribute(files / "queries", bank_of(files, "unlearned"), protocol_of(files), conditions=[1, 0, 2, 2])
    np.testing.assert_allclose(found["unlearned"].scores, expected.scores, rtol=1e-4, atol=1e-5)
    assert found["unlearned"].query_ids == expected.query_ids == found["queries"].query_ids

    code, printed = run(*[word for word in told if word not in ("--conditions", str(files / "queries.jsonl"))])
    assert code == 1 and "--conditions: must be given where the images of --data have some" in printed
    told[told.index("--data") + 1] = told[told.index("--data") + 1].removesuffix(",null=yes")
    code, printed = run(*told, "--out", files / "other")
    assert code == 1 and "data must have an empty condition, as of null=yes" in printed


def test_a_baseline_is_read_from_its_text() -> None:
    found = baseline("query-unlearning,stride=3,damping=0.5")
    assert found.settings == {"method": "query-unlearning", "stride": 3, "damping": 0.5}
