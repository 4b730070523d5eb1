"""Queues: claims end with their processes, runs are made once, and one that fails does not stop the others."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from guda_fast import CheckpointError
from guda_fast.counterfactuals import TrainConfig, train
from guda_fast.counterfactuals.locks import claim
from guda_fast.counterfactuals.processes import work_through
from guda_fast.counterfactuals.queue import Event, How, Place, complete
from series import FewRuns, FewRunsOrder, GoneOrder, weights

HOLD = """
import sys, time
from pathlib import Path
from guda_fast.counterfactuals.locks import claim
assert claim(Path(sys.argv[1])) is not None
print("held", flush=True)
time.sleep(120)
"""


def make(series: FewRuns, out: Path, **how: object) -> tuple[dict[str, str], list[Event]]:
    """Failures and events of one command in this process."""
    events: list[Event] = []
    failures = work_through(FewRunsOrder(), series, out, events.append, **how)  # type: ignore[arg-type]
    return dict(failures), events


@contextmanager
def holder(path: Path) -> Iterator[Callable[[], None]]:
    """Another process that has claimed a run, and what kills it."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"

        def kill() -> None:
            process.kill()
            process.wait()

        try:
            yield kill
        finally:
            process.kill()


def test_a_claim_is_one_process_s_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a.lock"
    first = claim(path)
    assert first is not None and claim(path) is None
    first.release()
    assert not path.exists()
    with claim(path) or pytest.fail("must be free"):
        assert claim(path) is None
    assert not path.exists()


def test_a_claim_ends_with_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with holder(path) as kill:
        assert claim(path) is None
        kill()
    found = claim(path)
    assert found is not None and path.exists()
    found.release()


def test_a_lock_file_that_was_replaced_is_not_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last holder removes it between another's opening and locking; somebody else has a new one by then."""
    path = tmp_path / "a.lock"
    import fcntl

    real, before = fcntl.flock, [path.unlink, path.touch]

    def flock(descriptor: int, operation: int) -> None:
        while before:
            before.pop(0)()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert claim(path) is None
    assert claim(path) is not None


def test_all_runs_are_made_once_and_as_train_makes_them(tmp_path: Path) -> None:
    series = FewRuns()
    failures, events = make(series, tmp_path)
    assert failures == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"], "nothing hidden is left"
    assert [event.name for event in events if event.kind == "finished"] == ["a", "b", "c"]
    assert Event("step", "b", 3, 3) in events
    from safetensors.torch import load_file

    found = load_file(tmp_path / "b" / "diffusion_pytorch_model.safetensors")
    expected = train(series.start, series.objective("b"), series.config("b")).model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert json.loads((tmp_path / "b" / "training.json").read_text())["settings"] == series.settings("b")

    made: list[str] = []
    failures, events = make(FewRuns(hook=made.append), tmp_path)
    assert failures == {} and events == [] and made == []


def test_what_a_process_left_that_was_killed_after_its_last_step_is_removed(tmp_path: Path) -> None:
    make(FewRuns(), tmp_path)
    place = Place(tmp_path)
    place.work("b").mkdir(parents=True)
    (place.work("b") / "checkpoint.safetensors").write_text("of a finished run")
    place.lock("c").touch()
    assert make(FewRuns(), tmp_path)[0] == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_notes_and_half_written_models_of_killed_commands_are_removed(tmp_path: Path) -> None:
    place = Place(tmp_path)
    half = place.work("b") / ".b-abcdefgh"
    half.mkdir(parents=True)
    (half / "half").write_text("written")
    place.failure("c").write_text(json.dumps({"command": "killed before it could say so", "error": "full"}))
    assert make(FewRuns(), tmp_path)[0] == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    place.hidden.mkdir()
    place.failure("a").touch()  # of a command that was killed after the model was there
    assert make(FewRuns(), tmp_path)[0] == {}
    assert not place.hidden.exists()


def test_a_folder_that_comes_in_the_way_fails_its_run_alone(tmp_path: Path) -> None:
    def hook(name: str) -> None:
        if name == "a":
            (tmp_path / "b").mkdir()
            (tmp_path / "b" / "training.json").write_text("{}")

    failures, events = make(FewRuns(hook=hook), tmp_path)
    assert failures.keys() == {"b"} and "b/training.json: must be the record of a finished run" in failures["b"]
    assert [event.kind for event in events if event.name == "b"] == ["failed"]
    assert (tmp_path / "c" / "training.json").exists()


@pytest.mark.slow
def test_what_ends_a_worker_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The data are gone when the worker processes open them."""
    events: list[Event] = []
    failures = work_through(GoneOrder(), FewRuns(), tmp_path, events.append, devices=("cpu", "cpu"))
    assert failures.keys() == {"a", "b", "c"}
    assert events == [Event("ended", "cpu", text="no images any more")] * 2
    assert "Traceback" not in capfd.readouterr().err


def test_a_failure_that_cannot_be_noted_is_not_tried_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk."""
    tried: list[str] = []

    def hook(name: str) -> None:
        tried.append(name)
        if name == "b":
            raise ValueError("no images")

    def full(path: Path, mode: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("guda_fast.counterfactuals.queue.atomic_write", full)
    failures, events = make(FewRuns(hook=hook), tmp_path)
    assert failures.keys() == {"b"} and tried == ["a", "b", "c"]
    assert Event("failed", "b", text="no images") in events


def test_other_settings_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    make(FewRuns(count=2), tmp_path)
    made: list[str] = []
    with pytest.raises(CheckpointError, match=r"a/training\.json: was made with other settings \(steps: wanted 4"):
        make(FewRuns(steps=4, hook=made.append), tmp_path)
    assert made == [] and not (tmp_path / "c").exists()


@pytest.mark.parametrize("together", [1, 3])
def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path, together: int) -> None:
    tried: list[str] = []

    def hook(name: str) -> None:
        tried.append(name)
        if name == "b":
            raise ValueError("no images")

    failures, events = make(FewRuns(hook=hook), tmp_path, together=together)
    assert failures == {"b": "no images"} and tried == ["a", "b", "c"]
    assert Event("failed", "b", text="no images") in events
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]
    failures, _ = make(FewRuns(), tmp_path)  # another command tries again
    assert failures == {} and (tmp_path / "b" / "training.json").exists()


def test_a_diverging_run_is_named_and_leaves_its_checkpoint(tmp_path: Path) -> None:
    series = FewRuns(steps=20, configs={"b": TrainConfig(20, lr=1e30, grad_clip=None)})
    failures, _ = make(series, tmp_path, checkpoint_every=1)
    assert failures.keys() == {"b"} and "finite" in failures["b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".runs", "a", "c"]
    assert list((tmp_path / ".runs" / "b").glob("checkpoint*"))


def test_runs_in_one_loop_are_those_of_one_at_a_time(tmp_path: Path) -> None:
    make(FewRuns(), tmp_path / "alone")
    _, events = make(FewRuns(), tmp_path / "together", together=2)
    assert weights(tmp_path / "alone") == weights(tmp_path / "together")
    steps = [event.name for event in events if event.kind == "step"]
    assert steps.index("b") < len(steps) - 1 - steps[::-1].index("a"), "a and b must have run side by side"


def test_only_runs_that_are_trained_alike_share_a_loop(tmp_path: Path) -> None:
    series = FewRuns(configs={"b": TrainConfig(5)})
    failures, events = make(series, tmp_path, together=3)
    assert failures == {}
    assert max(event.steps for event in events if event.name == "b") == 5
    assert max(event.steps for event in events if event.name in "ac") == 3


def test_what_a_killed_process_has_claimed_is_made_by_who_waits(tmp_path: Path) -> None:
    waiting = threading.Event()
    failures: dict[str, str] = {}

    def listen(event: Event) -> None:
        if event.kind == "waiting":
            waiting.set()

    def command() -> None:
        failures.update(work_through(FewRunsOrder(), FewRuns(), tmp_path, listen))

    thread = threading.Thread(target=command)
    with holder(Place(tmp_path).lock("b")) as kill:
        thread.start()
        assert waiting.wait(60)
        assert (tmp_path / "a").exists() and (tmp_path / "c").exists() and not (tmp_path / "b").exists()
        kill()
    thread.join(60)
    assert not thread.is_alive() and failures == {} and (tmp_path / "b").exists()


def test_short_runs_leave_nothing_when_they_are_stopped(tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.name == "b":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(FewRuns(), tmp_path, stop)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    complete(FewRuns(), tmp_path, lambda event: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize(("field", "value"), [("together", 0), ("checkpoint_every", 0)])
def test_how_is_checked(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"How: {field} must be at least 1, got 0"):
        How(**{field: value})


@pytest.mark.slow
def test_stopped_processes_end_at_once_and_leave_what_they_have(tmp_path: Path) -> None:
    """Ctrl-C is raised in the first process: at its next event, here."""

    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    order = FewRunsOrder(steps=200, count=2)
    with pytest.raises(KeyboardInterrupt):
        work_through(order, order.open(), tmp_path, stop, devices=("cpu", "cpu"), checkpoint_every=1)
    assert not multiprocessing.active_children()
    assert list((tmp_path / ".runs").glob("*/checkpoint.safetensors"))


@pytest.mark.slow
def test_processes_share_a_queue_and_one_that_dies_is_replaced(tmp_path: Path) -> None:
    """Two workers, of which one is killed while it trains: the other makes what it leaves."""
    started: dict[str, float] = {}
    killed: list[int] = []

    def listen(event: Event) -> None:
        if event.kind == "step":
            started.setdefault(event.name, time.monotonic())
            if len(started) == 2 and not killed:
                victim = multiprocessing.active_children()[0]
                assert victim.pid is not None
                os.kill(victim.pid, signal.SIGKILL)
                killed.append(victim.pid)

    order = FewRunsOrder(steps=30, count=3)
    failures = work_through(order, order.open(), tmp_path / "two", listen, devices=("cpu", "cpu"), checkpoint_every=5)
    assert killed and failures == {}
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        make(FewRuns(30, 3), tmp_path / "one")
    finally:
        torch.set_num_threads(threads)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
