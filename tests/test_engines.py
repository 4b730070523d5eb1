"""Engines in one process: what a shard's scores depend on, going on, additions, refusals, metrics, ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import guda_fast as gf
from engine_cases import QUERIES, command, contents, make_files, save_image
from guda_fast.engines import Event, Job, Log, Monitor, Rank, Worker
from guda_fast.engines.work import _status, alive, me, slices
from guda_fast.estimators import Budget
from guda_fast.prepare import Execution
from guda_fast.store import Shard, Store
from tiny import perturbed, tiny_unet

DRAWS = {"start": 5, "stride": 20}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def own(files, tmp_path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(files, tmp_path / "files")
    return tmp_path / "files"


def job_of(files: Path, **changes: object) -> Job:
    models = {name: gf.Source(files / "unlearned" / name) for name in ("g0", "g1", "g2")}
    how = Execution(batch_size=8, device="cpu")
    return Job(
        **{
            "queries": files / "queries",
            "base": files / "base",
            "counterfactuals": models,
            "draws": DRAWS,
            "execution": how,
            **changes,
        }
    )


def store_of(worker: Worker, path: Path, **sizes: int) -> Store:
    store = Store.create(path, worker.settings(), worker.inputs.bank.delta_hashes, **sizes)
    piece = worker.inputs.stream.piece(range(QUERIES))
    store.add_queries(piece.ids, piece.names)
    return store


def filled(worker: Worker, path: Path, **sizes: int) -> gf.Attribution:
    store = store_of(worker, path, **sizes)
    for shard in store.missing()[::-1]:
        assert store.write(shard, worker.score(store, shard, lambda forwards: None))
    return store.result()


def test_a_score_does_not_depend_on_its_shard_nor_on_what_came_before(files, tmp_path) -> None:
    worker = Worker(job_of(files))
    whole = filled(worker, tmp_path / "whole")
    for number, sizes in enumerate([{"shard_queries": 1}, {"shard_queries": 4, "shard_groups": 2}]):
        found = filled(worker, tmp_path / f"{number}", **sizes)
        np.testing.assert_array_equal(found.scores, whole.scores)
        np.testing.assert_array_equal(found.std_error, whole.std_error)
        np.testing.assert_array_equal(found.error_base, whole.error_base)


def test_the_scores_are_those_of_attribute(files, tmp_path) -> None:
    worker = Worker(job_of(files))
    found = filled(worker, tmp_path / "store", shard_queries=4)
    bank, protocol = worker.inputs.bank, worker.inputs.protocol
    expected = gf.attribute(files / "queries", bank, protocol, batch_size=8, plan="swap")
    assert (found.queries, found.query_ids, found.groups) == (expected.queries, expected.query_ids, expected.groups)
    # As far as attribute promises: 1e-5 of the scale of what is summed, here the base's error.
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-5 * expected.error_base.max())


def events_of(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_the_same_command_goes_on_and_additions_leave_their_cells_only(own, run, tmp_path) -> None:
    log = tmp_path / "log.jsonl"
    words = command(own, tmp_path / "store", "--log", log)
    code, printed = run(*words)
    assert code == 0 and "30 of 30 cells" in printed
    before = contents(tmp_path / "store")
    code, printed = run(*words)
    assert code == 0 and contents(tmp_path / "store") == before
    save_image(own / "queries" / "aa.png", 50)
    perturbed(tiny_unet(), 0.01, 9).save_pretrained(own / "unlearned" / "g9")
    log.unlink()
    code, printed = run(*words)
    assert code == 0 and "44 of 44 cells" in printed
    after = contents(tmp_path / "store")
    assert all(after[name] == data for name, data in before.items())
    computed = [event["shard"] for event in events_of(log) if event["event"] == "done"]
    assert sorted(f"{name}.parquet" for name in computed) == sorted(after.keys() - before.keys())
    # A later group's cells are those of a store that had it from the start.
    assert run(*command(own, tmp_path / "fresh"))[0] == 0
    found, fresh = (Store.open(tmp_path / name).result() for name in ("store", "fresh"))
    np.testing.assert_array_equal(found.scores, fresh.scores)


def test_what_a_command_does_not_have_is_left_to_others(own, run, tmp_path) -> None:
    assert run(*command(own, tmp_path / "store"))[0] == 0
    perturbed(tiny_unet(), 0.01, 9).save_pretrained(own / "g9")
    save_image(own / "queries" / "aa.png", 50)
    words = command(own, tmp_path / "store")
    place = words.index("--groups")
    words[place : place + 2] = ["--group", f"g9={own / 'g9'}"]
    code, printed = run(*words)
    assert code == 0 and "41 of 44 cells" in printed and "3 cells in 1 shards remain" in printed


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--seed", 7], "protocol.seed: stored 42, given 7"),
        (["--precision", "fp64"], 'precision: stored "fp32", given "fp64"'),
        (["--candidates", "x.json"], "--candidates"),
        (["--controls", "n*"], "--controls: must come without --store"),
        (["--force"], "--force"),
        (["--estimator", "budget", "--forwards", 100], "--store: must come with an estimator"),
        (["--estimator", "racing"], "--pilot: must be the file of a pilot"),
        (["--engine", "spark"], "--engine: must be one of"),
        (["--engine", "torchrun"], "RANK: must be a number"),
        (["--devices", "cpu", "--device", "cpu"], "--devices"),
    ],
)
def test_refusals(files, run, tmp_path, monkeypatch, extra, message) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    if extra[0] in ("--seed", "--precision"):
        assert run(*command(files, tmp_path / "store"))[0] == 0
    if extra[0] == "--candidates":
        (tmp_path / "x.json").write_text('{"00.png": ["g0"]}')
    code, printed = run(*command(files, tmp_path / "store", *extra))
    assert code == 1 and message in printed and "Traceback" not in printed


def test_options_of_a_store_alone_are_refused(files, run) -> None:
    words = ["score", files / "queries", "--base", files / "base", "--groups", files / "unlearned", "--metrics", "m"]
    code, printed = run(*words)
    assert code == 1 and "--metrics: must come with --store" in printed


def test_broken_images_stop_or_are_recorded(own, run, tmp_path) -> None:
    (own / "queries" / "04.png").write_text("no image")
    code, printed = run(*command(own, tmp_path / "store"))
    assert code == 1 and "04.png" in printed
    code, printed = run(*command(own, tmp_path / "store", "--on-error", "skip"))
    assert code == 0 and "skipped 04.png" in printed and "27 of 27 cells" in printed
    assert [failure.query for failure in Store.open(tmp_path / "store").failures()] == ["04.png"]


@pytest.mark.parametrize("size", [1, 5])  # alone in its shard, and in company
def test_an_image_that_breaks_after_it_was_added_has_no_cells(own, tmp_path, size) -> None:
    worker = Worker(job_of(own, on_error="skip"))
    store = store_of(worker, tmp_path / "store", shard_queries=size)
    (own / "queries" / "04.png").write_text("no image")
    for shard in store.missing():
        store.write(shard, worker.score(store, shard, lambda forwards: None))
    assert not store.missing() and "04.png" not in store.result().queries and len(store.result()) == QUERIES - 1


def test_another_image_of_a_name_is_refused(own, run, tmp_path) -> None:
    assert run(*command(own, tmp_path / "store"))[0] == 0
    save_image(own / "queries" / "04.png", 60)
    code, printed = run(*command(own, tmp_path / "store"))
    assert code == 1 and "04.png: must be the query of that name" in printed


def test_another_image_is_found_where_it_is_scored(own, tmp_path) -> None:
    worker = Worker(job_of(own))
    store = store_of(worker, tmp_path / "store")
    save_image(own / "queries" / "04.png", 60)
    with pytest.raises(ValueError, match=r"04\.png: must be the query that it was"):
        worker.score(store, store.missing()[0], lambda forwards: None)


def test_dry_run_says_what_is_left_and_writes_nothing(own, run, tmp_path) -> None:
    code, printed = run(*command(own, tmp_path / "store", "--dry-run"))
    assert code == 0, printed
    assert "cells        0 done, 30 left" in printed and "shards       0 done, 4 left" in printed
    assert not (tmp_path / "store").exists()
    assert run(*command(own, tmp_path / "store"))[0] == 0
    save_image(own / "queries" / "aa.png", 50)
    code, printed = run(*command(own, tmp_path / "store", "--dry-run"))
    assert "cells        30 done, 3 left" in printed and "shards       4 done, 1 left" in printed


def test_metrics_and_estimated_end(files, tmp_path) -> None:
    worker = Worker(job_of(files))
    store = store_of(worker, tmp_path / "store", shard_queries=3)
    clock = [0.0]
    shards = store.shards()
    with Monitor(store, shards, Log(None), metrics=tmp_path / "m", shown=False, now=lambda: clock[0]) as monitor:
        for shard in shards[:2]:
            store.write(shard, worker.score(store, shard, lambda forwards: None))
            clock[0] += 6.0
            monitor(Event("done", "w", shard.name, shard.cells, 6.0))
        assert monitor.rate() == 18 / 12 and monitor.done == 18
    text = (tmp_path / "m").read_text()
    assert "guda_fast_cells 30\n" in text and "guda_fast_cells_done 18\n" in text
    assert "guda_fast_seconds_left 8\n" in text and "guda_fast_shards_written_total 2\n" in text


def test_slices_have_every_shard_once() -> None:
    shards = [Shard(range(row, row + 1), range(1)) for row in range(11)]
    orders = slices(shards, 4)
    assert all(len(order) == len(shards) and set(order) == set(shards) for order in orders)
    assert len({order[0] for order in orders}) == 4
    assert set(slices(shards[:2], 4)[3]) == set(shards[:2])  # more processes than shards: they help


def test_owners_that_are_gone() -> None:
    host, namespace, _, began = me().split(":")
    assert alive(me())
    assert not alive(f"{host}:{namespace}:{os.getpid()}:{int(began) - 1}")  # the number came again
    assert not alive(f"{host}:{namespace}:{2**22 + 1}:{began}")
    with subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE) as process:
        ended = f"{host}:{namespace}:{process.pid}:{_status(process.pid)[1]}"
        assert alive(ended)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not alive(ended)  # though its entry is there until its parent asks how it ended
    assert alive(f"elsewhere:{namespace}:{2**22 + 1}:{began}") and alive("ray actor 3")


def test_ranks() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert Rank.of_torchrun(torchrun) == Rank(5, 8, 1)
    tasks = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    assert Rank.of_slurm(tasks) == Rank(5, 8, 1)
    array = {"SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "5"}
    assert Rank.of_slurm({**array, "SLURM_ARRAY_TASK_STEP": "2"}) == Rank(2, 5, 0)
    assert Rank.of_slurm({**array, **tasks}) == Rank(5 + 8 * 4, 40, 1)
    for wrong in ({}, {"SLURM_PROCID": "x", "SLURM_NTASKS": "8"}, {"SLURM_PROCID": "8", "SLURM_NTASKS": "8"}):
        with pytest.raises(ValueError, match="must be"):
            Rank.of_slurm(wrong)


def test_a_job_refuses_estimators_whose_cells_hang_together(files) -> None:
    with pytest.raises(ValueError, match="full or racing"):
        job_of(files, estimator=Budget(forwards=100))


def test_a_race_into_a_store_is_that_of_each_query(own, run, tmp_path) -> None:
    pilot = tmp_path / "pilot.npz"
    racing = ["--estimator", "racing", "--pilot", pilot]
    plain = ["score", own / "queries", "--base", own / "base", "--groups", own / "unlearned", "--batch-size", 8]
    draws = ["--start", 5, "--stride", 2]
    code, printed = run(*map(str, [*plain, *draws, *racing, "--pilot-queries", 8, "--out", tmp_path / "first"]))
    assert code == 0, printed
    stores = [tmp_path / "whole", tmp_path / "parts"]
    for store, size in zip(stores, (10, 3), strict=True):
        code, printed = run(*command(own, store, *racing, "--shard-queries", size, stride=2))
        assert code == 0, printed
    whole, parts = (Store.open(store).result() for store in stores)
    for name in ("scores", "std_error", "draws", "exact", "race_confidence"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    assert (whole.draws < 48).any()  # some were estimated
    perturbed(tiny_unet(), 0.01, 7).save_pretrained(own / "unlearned" / "g9")
    code, printed = run(*command(own, stores[0], *racing, stride=2))
    assert code == 1 and "g9" in printed
