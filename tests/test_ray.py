"""The engine of Ray on clusters of this machine: killed, stopped or failing, the store ends as an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine_cases import check, command, contents, finished, make_files, start, wait_for
from guda_fast.cli import main
from guda_fast.engines import Event, ray_actors
from guda_fast.engines.ray_actors import RayActors, _pool
from guda_fast.engines.work import Place, _status, me
from guda_fast.store import Store


def words_of(files: Path, store: Path) -> list[str]:
    """A command of 380 draws: a shard takes about a second, and what happens is told within half of that."""
    return command(files, store, "--samples", 4, stride=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def expected(files, tmp_path_factory) -> dict[str, bytes]:
    """The parts of an undisturbed run of one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert finished(start(words_of(files, folder / "store"), folder / "printed")) == 0
    return contents(folder / "store")


class Run:
    """A command line on a cluster of its own."""

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        self.log, self.printed = folder / "log", folder / "printed"
        self.before = len(self.events())
        words = [*words, "--engine", "ray", "--actors", "2", "--log", str(self.log)]
        with self.printed.open("w") as file:
            program = [sys.executable, "-c", "from guda_fast.cli import main; main()", *words]
            # A cluster counts the cores of the machine, which may be fewer than the actors.
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'}
            self.process = subprocess.Popen(program, stdout=file, stderr=file, env=environment)

    def events(self) -> list[dict[str, object]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines]

    def new(self, kind: str) -> list[dict[str, object]]:
        return [event for event in self.events()[self.before :] if event["event"] == kind]

    def wait_for(self, kind: str, count: int = 1) -> None:
        wait_for(lambda: len(self.new(kind)) >= count or self.process.poll() is not None, 120)
        assert len(self.new(kind)) >= count, self.printed.read_text()

    def actors(self) -> list[int]:
        return [int(str(event["worker"]).split(":")[2]) for event in self.new("ready")]

    def end(self) -> int:
        return self.process.wait(180)


def alive(process: int) -> bool:
    return _status(process)[0] not in ("", "Z")


@pytest.mark.slow
def test_parts_are_those_of_one_process(files, expected, tmp_path) -> None:
    run = Run(words_of(files, tmp_path / "store"), tmp_path)
    assert run.end() == 0, run.printed.read_text()
    check(tmp_path / "store", expected)
    assert len(run.new("ready")) == 2 and len(run.new("done")) == len(expected)
    printed = run.printed.read_text()
    assert "30 of 30 cells" in printed
    assert "INFO" not in printed and "WARNING" not in printed  # of Ray
    again = Run(words_of(files, tmp_path / "store"), tmp_path)
    assert again.end() == 0 and not again.new("ready")


@pytest.mark.slow
def test_actors_that_are_killed_are_replaced(files, expected, tmp_path) -> None:
    run = Run(words_of(files, tmp_path / "store"), tmp_path)
    for number in range(2):
        run.wait_for("begun", number + 1)
        victims = [process for process in run.actors() if alive(process)]
        if victims:
            os.kill(victims[-1], signal.SIGKILL)
    assert run.end() == 0, run.printed.read_text()
    assert len(run.new("ready")) > 2
    died = {event["worker"]: str(event["text"]) for event in run.new("died")}
    assert died and died.keys() <= {event["worker"] for event in run.new("ready")}
    assert all(text.startswith("worker on cpu was lost") for text in died.values())
    check(tmp_path / "store", expected)


@pytest.mark.slow
def test_a_driver_that_is_killed_and_one_that_is_asked_to_stop(files, expected, tmp_path) -> None:
    words = words_of(files, tmp_path / "store")
    first = Run(words, tmp_path)
    first.wait_for("begun")
    first.process.kill()
    first.process.wait()
    wait_for(lambda: not any(alive(process) for process in first.actors()))  # the cluster ends with it
    assert Store.open(tmp_path / "store").missing()
    second = Run(words, tmp_path)
    second.wait_for("begun")  # though the dead have leases
    second.process.send_signal(signal.SIGTERM)
    assert second.end() == 0
    owners = {owner for _, owner in Store.open(tmp_path / "store").leases()}  # those of the dead may be left
    assert second.new("stop") and not owners & {event["worker"] for event in second.new("ready")}
    assert Run(words, tmp_path).end() == 0
    check(tmp_path / "store", expected, leases=True)


@pytest.mark.slow
def test_an_error_of_an_actor_ends_the_run_with_its_text(files, tmp_path) -> None:
    run = Run(words_of(files, tmp_path / "store"), tmp_path)
    run.wait_for("start")  # actors open the files later
    weights = files / "unlearned" / "g1" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-100])
        assert run.end() == 1
    finally:
        weights.write_bytes(whole)
    printed = run.printed.read_text()
    assert "guda-fast: error:" in printed and "g1/diffusion_pytorch_model.safetensors" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("resources", "actors", "gpus", "shards", "expected"),
    [
        ({"CPU": 4.0}, None, None, 100, (4, 0.0)),
        ({"CPU": 4.0}, None, None, 3, (3, 0.0)),  # no more actors than shards
        ({"CPU": 4.0}, 2, None, 100, (2, 0.0)),
        ({"CPU": 4.0, "GPU": 2.0}, None, None, 100, (2, 1.0)),
        ({"CPU": 4.0, "GPU": 2.0}, None, 0.5, 100, (4, 0.5)),
        ({"CPU": 4.0, "GPU": 2.0}, None, 0.4, 100, (4, 0.4)),  # two on each, for a GPU is not shared out further
        ({"CPU": 4.0, "GPU": 3.0}, None, 2, 100, (1, 2)),
        ({"CPU": 4.0, "GPU": 2.0}, None, 0, 100, (4, 0)),
    ],
)
def test_actors_fill_the_cluster(resources, actors, gpus, shards, expected) -> None:
    found = _pool(resources, actors, gpus, shards)
    assert (found.actors, found.gpus) == expected


@pytest.mark.parametrize(
    ("resources", "actors", "gpus", "says"),
    [
        ({"CPU": 2.0}, 3, None, "2 CPUs have room for 2 actors of 1 CPU each, got 3"),
        ({"CPU": 2.0}, None, 0.5, "0 GPUs have room for 0 actors of 0.5 GPU each"),
        ({"CPU": 2.0, "GPU": 1.0}, None, 2, "1 GPUs have room for 0 actors of 2 GPU each"),
    ],
)
def test_actors_that_do_not_fit_are_refused_before_ray_waits_for_them(resources, actors, gpus, says) -> None:
    with pytest.raises(ValueError, match=says):
        _pool(resources, actors, gpus, 100)


class Cluster:
    """In place of Ray: one actor, a process that ends some time after it has been killed."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def remote(self, **options: object) -> object:
        owner = me().split(":")
        owner[2:] = [str(self.process.pid), _status(self.process.pid)[1]]
        told = iter([[Event("ready", ":".join(owner))]])
        actor = SimpleNamespace(serve=SimpleNamespace(remote=lambda task: told))
        return lambda actor_class: SimpleNamespace(remote=lambda: actor)

    def get(self, told: object) -> object:
        return told

    def kill(self, actor: object) -> None:
        threading.Timer(0.3, self.process.kill).start()


def test_an_actor_is_no_more_once_it_has_been_ended(monkeypatch) -> None:
    cluster = Cluster()
    monkeypatch.setattr(ray_actors, "ray", cluster)
    actor = ray_actors._Handle(None, 0.0)  # type: ignore[arg-type]
    assert [event.kind for event in actor.events()] == ["ready"]
    actor.stop()
    actor.end(0.0)
    assert not alive(cluster.process.pid)  # or it could claim another shard, after its leases have been revoked
    cluster.process.wait()


def test_wrong_numbers_are_refused() -> None:
    place = Place(lambda: False)
    with pytest.raises(ValueError, match="actors must be at least 1, got 0"):
        RayActors(place, 0)
    with pytest.raises(ValueError, match=r"gpus must be whole where it is above 1, got 1\.5"):
        RayActors(place, gpus=1.5)
    with pytest.raises(TypeError, match="actors must be an integer"):
        RayActors(place, 1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["--actors=2", "--actor-gpus=0.5", "--address=auto"])
def test_options_of_ray_come_with_ray(files, tmp_path, option, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["guda-fast", *command(files, tmp_path / "store", option)])
    with pytest.raises(SystemExit):
        main()
    assert f"{option.partition('=')[0]}: must come with --engine ray, got --engine local" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_an_address_where_nothing_answers_is_said_at_once(files, tmp_path, monkeypatch, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free again below
    words = command(files, tmp_path / "store", "--engine", "ray", "--address", f"127.0.0.1:{port}")
    monkeypatch.setattr(sys, "argv", ["guda-fast", *words])
    with pytest.raises(SystemExit):
        main()
    assert f"--address: must be that of a Ray cluster, found none at 127.0.0.1:{port}" in capsys.readouterr().err


def test_without_ray_the_extra_is_named(files, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.delitem(sys.modules, "guda_fast.engines.ray_actors", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sys, "argv", ["guda-fast", *command(files, tmp_path / "store", "--engine", "ray")])
    with pytest.raises(SystemExit):
        main()
    assert "pip install 'guda_fast[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
