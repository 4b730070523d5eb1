"""Engines on processes that are killed, stopped, or started twice: the store ends as that of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from engine_cases import check, command, contents, finished, make_files, moments, start, wait_for
from guda_fast.store import Store

pytestmark = pytest.mark.slow
STRIDE = 2  # 48 draws: a shard takes long enough to be disturbed


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def expected(files, tmp_path_factory) -> dict[str, bytes]:
    """The parts of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert finished(start(command(files, folder / "store", stride=STRIDE), folder / "printed")) == 0
    return contents(folder / "store")


def events(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def kinds(log: Path) -> list[object]:
    return [event["event"] for event in events(log)]


def test_a_driver_that_is_killed_at_any_moment_and_started_again(files, expected, tmp_path) -> None:
    begin = time.monotonic()
    assert finished(start(command(files, tmp_path / "whole", stride=STRIDE), tmp_path / "printed")) == 0
    usual = time.monotonic() - begin
    killed = 0
    for number, moment in enumerate(moments(0, 12, usual)):
        store = tmp_path / f"store{number // 4}"  # four times on one store, and on the next
        process = start(command(files, store, stride=STRIDE), tmp_path / "printed")
        process.join(moment)
        killed += process.is_alive()
        process.kill()
        process.join()
    assert killed >= 6
    for number in range(3):
        store = tmp_path / f"store{number}"
        # The leases of the dead, of 300 seconds, are not waited for.
        assert finished(start(command(files, store, stride=STRIDE), tmp_path / "printed")) == 0
        check(store, expected, leases=True)


def kill_a_worker(log: Path, process: ForkProcess, killed: set[object], moment: float) -> None:
    """When one that has not been killed yet has begun a shard, and a random time has passed."""

    def fresh() -> list[object]:
        return [event["worker"] for event in events(log) if event["event"] == "begun" and event["worker"] not in killed]

    wait_for(lambda: fresh() or not process.is_alive())
    time.sleep(moment)
    if fresh() and process.is_alive():
        worker = fresh()[-1]
        killed.add(worker)
        with suppress(ProcessLookupError):  # it has finished
            os.kill(int(str(worker).split(":")[2]), signal.SIGKILL)


@pytest.mark.parametrize(("forks", "kills"), [(True, 20), (False, 1)])
def test_workers_that_are_killed_are_started_again(files, expected, tmp_path, forks, kills) -> None:
    """Forked workers at twenty random moments, over as many runs as it takes; a spawned one once."""
    killed: set[object] = set()
    died = 0
    chances = moments(1, 200, 0.2)
    while died < kills:
        folder = tmp_path / str(len(killed))
        folder.mkdir()
        words = command(files, folder / "store", "--log", folder / "log", "--devices", "cpu,cpu", stride=STRIDE)
        process = start(words, folder / "printed", forks=forks)
        for _ in range(4 if forks else 1):
            kill_a_worker(folder / "log", process, killed, next(chances))
        if finished(process) != 0:  # three deaths in a row are the end of a run, and not of the store
            assert "3 times without a finished shard" in (folder / "printed").read_text()
            assert finished(start(words, folder / "printed")) == 0
        died += kinds(folder / "log").count("died")
        check(folder / "store", expected)


def test_an_error_of_a_worker_ends_the_run_with_its_text(files, tmp_path) -> None:
    words = command(files, tmp_path / "store", "--devices", "cpu,cpu", stride=STRIDE)
    # Spawned workers, which load their models seconds after the run has its own.
    first = start([*words, "--log", str(tmp_path / "log")], tmp_path / "first")
    wait_for(lambda: "start" in kinds(tmp_path / "log"))
    weights = files / "unlearned" / "g1" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-100])
        assert finished(first) == 1
    finally:
        weights.write_bytes(whole)
    printed = (tmp_path / "first").read_text()
    assert "guda-fast: error:" in printed and "g1/diffusion_pytorch_model.safetensors" in printed
    assert "Traceback" not in printed


def test_a_rank_that_hangs_loses_its_shard(files, expected, tmp_path) -> None:
    words = command(files, tmp_path / "store", "--engine", "torchrun", "--lease", 1.5, stride=STRIDE)
    ranks = {"WORLD_SIZE": 2, "LOCAL_RANK": 0}
    hung = start([*words, "--log", str(tmp_path / "log")], tmp_path / "first", RANK=0, **ranks)
    wait_for(lambda: "begun" in kinds(tmp_path / "log"))
    os.kill(hung.pid, signal.SIGSTOP)
    try:
        done = kinds(tmp_path / "log").count("done")
        assert finished(start(words, tmp_path / "second", RANK=1, **ranks)) == 0
        assert done < len(expected) == len(contents(tmp_path / "store"))
    finally:
        os.kill(hung.pid, signal.SIGCONT)
    assert finished(hung) == 0  # what it had is dropped
    assert "dropped" in kinds(tmp_path / "log") or done == kinds(tmp_path / "log").count("done")
    check(tmp_path / "store", expected)


def test_two_runs_at_once_share_the_work(files, expected, tmp_path) -> None:
    words = command(files, tmp_path / "store", stride=STRIDE)
    logs = [tmp_path / "log0", tmp_path / "log1"]
    runs = [start([*words, "--log", str(log)], log.with_suffix(".txt")) for log in logs]
    assert [finished(run) for run in runs] == [0, 0]
    done = [event["shard"] for log in logs for event in events(log) if event["event"] == "done"]
    assert sorted(f"{name}.parquet" for name in done) == sorted(expected)  # none double
    check(tmp_path / "store", expected)


@pytest.mark.parametrize(("devices", "number"), [("cpu", signal.SIGINT), ("cpu,cpu", signal.SIGTERM)])
def test_a_run_that_is_asked_to_stop_says_what_remains(files, expected, tmp_path, number, devices) -> None:
    log = tmp_path / "log"
    words = command(files, tmp_path / "store", "--log", log, "--devices", devices, stride=1)
    process = start(words, tmp_path / "printed", forks=True)
    wait_for(lambda: "begun" in kinds(log))
    os.kill(process.pid, number)
    assert finished(process) == 0
    printed = (tmp_path / "printed").read_text()
    assert "remain; the same command goes on from them" in printed and "stop" in kinds(log)
    assert Store.open(tmp_path / "store").leases() == []


def test_torchrun(files, expected, tmp_path) -> None:
    words = command(files, tmp_path / "store", "--engine", "torchrun", "--device", "cpu", stride=STRIDE)
    script = tmp_path / "score.py"
    script.write_text("from guda_fast.cli import main\nmain()\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--"]
    run = [*torchrun, str(script), *words]
    found = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    check(tmp_path / "store", expected)
