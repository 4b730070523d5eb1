"""guda-fast evaluate, as typed: joined results, floors, controls, baselines, subsets, and what is wrong with a file."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import guda_fast as gf
from guda_fast.baselines import pixel_similarity
from guda_fast.datasets import load_digits
from guda_fast.datasets.queries import load_queries
from guda_fast.evaluation import top_1_agreement
from test_p_values import result_of

DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """queries/ of 12 digits, their scores by logo, logo-1, guda (with control groups) and esd (in another order)."""
    rng = np.random.default_rng(0)
    (tmp_path / "queries").mkdir()
    pixels = ((load_digits().images[::150, 0].numpy() + 1) * 127.5).astype(np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "queries" / f"{index:02d}.png")
    queries = load_queries(tmp_path / "queries", channels=1)
    truth = rng.normal(size=(len(queries), 10))
    plain = {"queries": queries.names, "query_ids": queries.query_ids}

    def write(name: str, scores: np.ndarray, groups: list[str]) -> gf.Attribution:
        made = result_of(scores, groups, **plain)
        made = made.with_provenance(delta_hashes={group: f"{name} {group}" for group in groups})
        made.to_parquet(tmp_path / name)
        return made

    write("logo", truth, DIGITS)
    write("logo-1", truth + 0.3 * rng.normal(size=truth.shape), DIGITS)
    controls = [f"control-{index}" for index in range(19)]
    noisy = truth + 0.5 * rng.normal(size=truth.shape)
    write("guda", np.hstack([noisy, rng.normal(size=(len(truth), 19))]), DIGITS + controls)
    write("esd", rng.normal(size=truth.shape), DIGITS[::-1])
    return tmp_path


def agreement_rows(folder: Path) -> dict[tuple[str, str], float]:
    with open(folder / "agreement.csv", newline="", encoding="utf-8") as file:
        return {(row["method"], row["metric"]): float(row["mean"]) for row in csv.DictReader(file)}


def test_methods_beside_two_oracles(files: Path, run) -> None:
    code, printed = run("evaluate", "GUDA=guda", "esd", "--oracle", "logo", "--oracle", "logo-1", "--resamples", 100)
    assert code == 0, printed
    rows = agreement_rows(Path("evaluation"))
    assert list(dict.fromkeys(method for method, _ in rows)) == ["GUDA", "esd", "oracle, other seed", "random"]
    read = {name: gf.Attribution.from_parquet(name) for name in ("guda", "esd", "logo", "logo-1")}
    esd = read["esd"].scores[:, ::-1]
    expected = np.mean([top_1_agreement(esd, read[name].scores) for name in ("logo", "logo-1")])
    assert rows["esd", "top-1"] == pytest.approx(expected, abs=1e-15)
    floor = top_1_agreement(read["logo"].scores, read["logo-1"].scores).mean()
    assert rows["oracle, other seed", "top-1"] == pytest.approx(floor, abs=1e-15)
    text = Path("evaluation/evaluation.md").read_text()
    assert text.strip() in printed and "| GUDA   |       19 |       0.05 |" in text
    assert {path.name for path in Path("evaluation").iterdir()} == {
        "agreement.csv",
        "agreement.png",
        "confusion.csv",
        "evaluation.md",
        "gaps.csv",
        "run.json",
        "significance.csv",
    }
    record = json.loads(Path("evaluation/run.json").read_text())
    assert set(record["inputs"]["methods"]) == {"GUDA", "esd"} and len(record["inputs"]["oracles"]) == 2


def test_scores_of_another_method_come_as_csv(files: Path, run) -> None:
    gf.Attribution.from_parquet("esd").to_csv("CLIP.csv")
    code, printed = run("evaluate", "CLIP.csv", "esd", "--oracle", "logo", "--metric", "MRR", "--resamples", 10)
    assert code == 0, printed
    rows = agreement_rows(Path("evaluation"))
    assert rows["CLIP", "MRR"] == rows["esd", "MRR"]


def test_one_oracle_and_chosen_metrics(files: Path, run) -> None:
    arguments = ["evaluate", "esd", "--oracle", "logo", "--metric", "NDCG@2", "--gain", "linear", "--resamples", 10]
    code, printed = run(*arguments)
    assert code == 0 and "own noise is not known" in printed, printed
    assert set(agreement_rows(Path("evaluation"))) == {("esd", "NDCG@2 (linear)"), ("random", "NDCG@2 (linear)")}
    code, printed = run(*arguments)
    assert code == 1 and "--out: evaluation must not hold a report already" in printed
    assert run(*arguments, "--force")[0] == 0


def test_pixel_similarity_is_a_row(files: Path, run) -> None:
    both = ["--similarity", "mean", "--similarity", "max"]
    code, printed = run(
        "evaluate", "esd", "--oracle", "logo", "--data", "digits", "--queries", "queries", *both, "--resamples", 10
    )
    assert code == 0, printed
    images = load_queries("queries", channels=1)
    logo = gf.Attribution.from_parquet("logo").scores
    for how in ("mean", "max"):
        scores = pixel_similarity(images.x0[images.row], load_digits(), reduce=how)
        found = agreement_rows(Path("evaluation"))[f"pixel cosine, {how}", "top-1"]
        assert found == top_1_agreement(scores, logo).mean()


def test_conditional_queries_are_joined_by_name(files: Path, run) -> None:
    """Their ids hold the condition, which an image alone does not tell."""
    for name in ("esd", "logo"):
        found = gf.Attribution.from_parquet(name).with_provenance(conditions={"names": ["class_labels"]})
        replace(found, query_ids=tuple(range(12))).to_parquet(name)
    arguments = ["evaluate", "esd", "--oracle", "logo", "--data", "digits", "--queries", "queries", "--resamples", 10]
    code, printed = run(*arguments)
    assert code == 0 and "pixel cosine, mean" in printed, printed
    Path("queries/03.png").unlink()
    code, printed = run(*arguments, "--force")
    assert code == 1 and "--queries: queries must hold the images that were scored, found none of 03.png" in printed


def test_subsets_give_the_lds(files: Path, run) -> None:
    logo = gf.Attribution.from_parquet("logo")
    lacks = {f"without {k} and {k + 1}": [str(k), str(k + 1)] for k in range(9)}
    outcomes = np.stack([logo.scores[:, k] + logo.scores[:, k + 1] for k in range(9)], axis=1)
    plain = {"queries": logo.queries[::-1], "query_ids": logo.query_ids[::-1]}
    result_of(outcomes[::-1], list(lacks), **plain).to_parquet("subset-scores")
    Path("subsets.json").write_text(json.dumps(lacks))
    arguments = ["evaluate", "esd", "--oracle", "logo", "--subset-scores", "subset-scores", "--resamples", 10]
    code, printed = run(*arguments, "--subsets", "subsets.json")
    assert code == 0, printed
    assert agreement_rows(Path("evaluation"))["the oracle", "LDS"] == 1
    Path("subsets.json").write_text(json.dumps({**lacks, "without 3 and 4": ["3", "ten"]}))
    code, printed = run(*arguments, "--subsets", "subsets.json", "--force")
    assert code == 1 and "subsets.json: 'without 3 and 4' must list groups among 0, 1" in printed
    code, printed = run(*arguments, "--force")
    assert code == 1 and "--subsets: must come with --subset-scores" in printed


def test_controls_by_path_and_by_pattern(files: Path, run) -> None:
    guda = gf.Attribution.from_parquet("guda")
    null = [group for group in guda.groups if group.startswith("control")]
    guda.select(DIGITS).to_parquet("groups")
    guda.select(null).to_parquet("null")
    names = tuple(group.replace("control", "random set") for group in guda.groups)
    replace(guda, groups=names).to_parquet("renamed")
    found = []
    for method, controls in (("guda", None), ("groups", "null"), ("renamed", "random set*"), ("groups", "groups=null")):
        arguments = ["evaluate", method, "--oracle", "logo", "--resamples", 10, "--force"]
        code, printed = run(*arguments, *([] if controls is None else ["--controls", controls]))
        assert code == 0, printed
        found.append(Path("evaluation/significance.csv").read_text().replace(method, "M"))
    assert found[0] == found[1] == found[2] == found[3]
    code, printed = run("evaluate", "groups", "esd", "--oracle", "logo", "--controls", "null", "--force")
    assert code == 1 and "--controls: must be NAME=PATH with NAME one of groups, esd, got 'null'" in printed
    code, printed = run("evaluate", "esd", "--oracle", "logo", "--controls", "nul", "--force")
    assert code == 1 and "--controls: must be a folder, or a pattern that fits some of 0, 1" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["esd", "--oracle", "none"], "none"),
        (["esd", "--oracle", "logo", "--oracle", "logo"], "--oracle: paths must differ"),
        (["esd", "other/esd", "--oracle", "logo"], "SCORES: names must differ, got 'esd' twice; write NAME=PATH"),
        (["=esd", "--oracle", "logo"], "SCORES: must be PATH or NAME=PATH, got '=esd'"),
        (["random=esd", "--oracle", "logo"], "a method must have a name other than 'random'"),
        (["fewer", "--oracle", "logo"], "fewer: must have the queries of --oracle logo, found 00.png missing"),
        (["esd", "--oracle", "logo", "--oracle", "fewer"], "--oracle fewer: must have the queries of --oracle logo"),
        (["lacks", "--oracle", "logo"], "lacks: must have the groups of --oracle logo, found 3 missing"),
        (["damaged", "--oracle", "logo"], "scores.parquet: must be scores written by guda_fast"),
        (["esd", "--oracle", "logo", "--metric", "top"], "metrics must be among 'top-k'"),
        (["esd", "--oracle", "logo", "--reference", "x"], "reference must be one of 'leave-one-out', 'mean'"),
        (["esd", "--oracle", "logo", "--data", "digits"], "--data: must come with --queries"),
        (["esd", "--oracle", "logo", "--data", "mnist", "--queries", "queries"], "mnist"),
        (["esd", "--oracle", "logo", "--similarity", "max"], "--similarity: must come with --data and --queries"),
        (["esd", "--oracle", "logo", "--level", "7"], "--level: must come with scores that have p-values"),
        (["esd", "--oracle", "logo", "--controls", "y=guda"], "must be NAME=PATH with NAME one of esd, got 'y=guda'"),
        (["pixel cosine, mean=esd", "--oracle", "logo"], "names must be other than those of rows of pixel similarity"),
        (["the oracle=esd", "--oracle", "logo"], "a method must have a name other than 'the oracle'"),
        (["guda", "--oracle", "logo", "--level", "2"], "level must be between 0 and 1, got 2.0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(files: Path, run, arguments: list[str], message: str) -> None:
    logo = gf.Attribution.from_parquet("logo")
    logo.select([group for group in DIGITS if group != "3"]).to_parquet("lacks")
    changes = {"queries": logo.queries[1:], "query_ids": logo.query_ids[1:]}
    result_of(logo.scores[1:], DIGITS, **changes).to_parquet("fewer")
    whole = (files / "logo" / "scores.parquet").read_bytes()
    (files / "damaged").mkdir()
    (files / "damaged" / "scores.parquet").write_bytes(whole[: len(whole) // 2])
    code, printed = run("evaluate", *arguments)
    assert code == 1 and "Traceback" not in printed and "guda-fast: error:" in printed
    assert message in " ".join(printed.split()), printed
    assert not Path("evaluation").exists()


def test_an_oracle_given_twice_is_no_second_seed(files: Path, run) -> None:
    logo = gf.Attribution.from_parquet("logo")
    replace(logo, scores=logo.scores + 1).to_parquet("other draws")
    logo.with_provenance(delta_hashes={}).to_parquet("copy")
    said = "must be of another training seed than --oracle logo, found"
    for again, found in (
        ("logo/scores.parquet", "equal scores"),
        ("copy", "equal scores"),
        ("other draws", "the same model of 0"),
    ):
        code, printed = run("evaluate", "esd", "--oracle", "logo", "--oracle", again)
        assert code == 1 and f"--oracle {again}: {said} {found}" in " ".join(printed.split()), printed


def test_groups_are_refused_as_the_null(files: Path, run) -> None:
    guda = gf.Attribution.from_parquet("guda")
    guda.select(DIGITS).to_parquet("groups")
    code, printed = run("evaluate", "groups", "--oracle", "logo", "--controls", "groups", "--resamples", 10)
    assert code == 1 and "--controls: groups: groups: p_values: controls must not be groups" in printed
    code, printed = run("evaluate", "groups", "--oracle", "logo", "--controls", "guda", "--resamples", 10)
    assert code == 0 and "| groups |       19 |" in printed, printed


def test_the_pattern_of_controls_holds_for_the_oracle_too(files: Path, run) -> None:
    for name in ("guda", "logo"):
        found = gf.Attribution.from_parquet(name)
        digits = found.select(DIGITS)
        names = ("set 0", "set 1")
        scores = np.hstack([digits.scores, digits.scores[:, :2]])
        result_of(scores, [*DIGITS, *names], queries=digits.queries, query_ids=digits.query_ids).to_parquet(f"{name} r")
    code, printed = run("evaluate", "guda r", "--oracle", "logo r", "--controls", "set *", "--resamples", 10)
    assert code == 0 and "12 queries x 10 groups" in printed, printed


def test_inputs_are_recorded_with_their_hashes(files: Path, run) -> None:
    guda = gf.Attribution.from_parquet("guda")
    guda.select(DIGITS).to_parquet("groups")
    guda.select([group for group in guda.groups if group not in DIGITS]).to_parquet("null")
    lacks = {f"model {k}": [str(k), str(k + 1)] for k in range(9)}
    Path("subsets.json").write_text(json.dumps(lacks))
    replace(guda.select(DIGITS[:9]), groups=tuple(lacks)).to_parquet("subset-scores")
    arguments = ["evaluate", "oracle 0=groups", "--oracle", "logo", "--controls", "null", "--data", "digits"]
    arguments += ["--queries", "queries", "--subset-scores", "subset-scores", "--subsets", "subsets.json"]
    code, printed = run(*arguments, "--resamples", 10)
    assert code == 0, printed
    inputs = json.loads(Path("evaluation/run.json").read_text())["inputs"]
    assert set(inputs["methods"]) == set(inputs["controls"]) == {"oracle 0"}
    assert (
        inputs["subsets"]["path"] == "subsets.json"
        and inputs["subset_scores"]["path"] == "subset-scores/scores.parquet"
    )
    assert len(inputs["data"]) == len(inputs["queries"]) == 32
    Path("queries/03.png").rename("queries/3.png")
    assert run(*arguments, "--resamples", 10, "--force")[0] == 0
    again = json.loads(Path("evaluation/run.json").read_text())["inputs"]
    assert again["queries"] != inputs["queries"] and again["data"] == inputs["data"]


def test_what_would_fail_at_the_end_is_said_at_the_start(files: Path, run, monkeypatch) -> None:
    def work(path: Path) -> gf.Attribution:
        raise AssertionError("scores were read")

    monkeypatch.setattr("guda_fast.cli.evaluate.read_scores", work)
    Path("file").write_text("")
    code, printed = run("evaluate", "esd", "--oracle", "logo", "--out", "file")
    assert code == 1 and "--out: must be a folder that can be written" in printed
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, printed = run("evaluate", "esd", "--oracle", "logo")
    assert code == 1 and "guda-fast evaluate needs matplotlib" in printed
