"""A run that was killed goes on from its folder, and ends with the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from guda_fast.counterfactuals import Batch, TrainConfig, TrainResult, train, train_together
from guda_fast.errors import CheckpointError
from tiny import tiny_unet
from training import Dropping, Noise, assert_equal

CONFIGS = {
    "plain": TrainConfig(6),
    "averaged": TrainConfig(6, ema_decay=0.9, warmup_steps=4, decay="cosine", weight_decay=0.1),
    "accumulated": TrainConfig(6, accumulate=2, grad_clip=None),
    "masked": TrainConfig(6, saliency=0.3, weight_decay=0.1, trained=("*conv*",)),
    "bounded": TrainConfig(6, lr=0.05, retain_bound=1.2, bound_every=1, ema_decay=0.5),
    "scaled": TrainConfig(6, precision="fp16"),
    "lora": TrainConfig(6, lora_rank=2, ema_decay=0.9),
}


class Killed(Exception):
    pass


def interrupted(step: int, model: torch.nn.Module, config: TrainConfig, work: Path, **options: Any) -> None:
    """Train until ``step`` steps are done."""

    def kill(done: int, _: int) -> None:
        if done == step:
            raise Killed

    with pytest.raises(Killed):
        train(model, Noise(forget_share=0.1), config, work=work, progress=kill, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_goes_on_where_it_was_killed(name: str, tmp_path: Path) -> None:
    base, config = tiny_unet(), CONFIGS[name]
    expected = train(base, Noise(forget_share=0.1), config)
    # Before the first checkpoint, and where the last one is one or two steps back.
    for step in (1, len(expected.losses) - 1):
        interrupted(step, base, config, tmp_path / str(step), checkpoint_every=2)
        steps: list[int] = []
        found = train(
            base,
            Noise(forget_share=0.1),
            config,
            work=tmp_path / str(step),
            checkpoint_every=2,
            progress=lambda done, _, steps=steps: steps.append(done),
        )
        assert_equal(found, expected)
        assert (found.steps, found.stopped) == (expected.steps, expected.stopped)
        assert steps[0] == step // 2 * 2 + 1
        assert without_seconds(found) == without_seconds(expected)
        written = (tmp_path / str(step) / "log.jsonl").read_text().splitlines()
        assert written == list(found.log)
    if name == "bounded":
        assert expected.stopped is not None and 0 < expected.steps < len(expected.losses)


def without_seconds(result: TrainResult) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in result.log]
    for line in lines:
        assert line.pop("seconds") >= 0
    return lines


def test_dropout_goes_on_too(tmp_path: Path) -> None:
    interrupted(3, Dropping(1.0), TrainConfig(5), tmp_path, checkpoint_every=2)
    found = train(Dropping(1.0), Noise(forget_share=0.1), TrainConfig(5), work=tmp_path)
    assert_equal(found, train(Dropping(1.0), Noise(forget_share=0.1), TrainConfig(5)))


def test_a_finished_run_is_given_again_without_a_step(tmp_path: Path) -> None:
    first = train(tiny_unet(), Noise(), TrainConfig(3), work=tmp_path)
    steps: list[int] = []
    again = train(tiny_unet(), Noise(), TrainConfig(3), work=tmp_path, progress=lambda done, _: steps.append(done))
    assert steps == [] and again.seconds == first.seconds and again.log == first.log
    assert_equal(again, first)


def test_a_half_written_line_of_the_log_is_written_again(tmp_path: Path) -> None:
    interrupted(5, tiny_unet(), TrainConfig(6), tmp_path, checkpoint_every=4)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    found = train(tiny_unet(), Noise(forget_share=0.1), TrainConfig(6), work=tmp_path)
    assert [line["step"] for line in without_seconds(found)] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "log.jsonl").read_text().splitlines() == list(found.log)


@pytest.mark.parametrize("damage", ['{"step": null}', '{"step": 3}x', "[]"])
def test_a_damaged_line_is_named_before_the_checkpoint_and_made_again_after_it(damage: str, tmp_path: Path) -> None:
    interrupted(5, tiny_unet(), TrainConfig(6), tmp_path, checkpoint_every=4)
    path = tmp_path / "log.jsonl"
    lines = path.read_text().splitlines()
    bad = [*lines[:2], damage, *lines[3:]]
    path.write_text("\n".join(bad) + "\n")
    with pytest.raises(CheckpointError, match=r"log.jsonl, line 3: must be the JSON object of a step"):
        train(tiny_unet(), Noise(forget_share=0.1), TrainConfig(6), work=tmp_path)
    assert path.read_text().splitlines() == bad
    path.write_text("\n".join([*lines[:4], damage, "\0\0"]) + "\n")
    found = train(tiny_unet(), Noise(forget_share=0.1), TrainConfig(6), work=tmp_path)
    assert [line["step"] for line in without_seconds(found)] == [1, 2, 3, 4, 5, 6]


def test_what_a_killed_process_was_writing_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left, other = tmp_path / ".0123456789abcdef.tmp", tmp_path / ".notes.tmp"
    for path in (left, other):
        path.write_bytes(b"half of a checkpoint")
    train(tiny_unet(), Noise(), TrainConfig(1), work=tmp_path)
    assert not left.exists() and other.exists()


def test_runs_together_that_were_killed_between_two_checkpoints_go_on_from_their_own(tmp_path: Path) -> None:
    """The one has the checkpoint of step 4, the other still that of step 2."""
    runs = {"a": Noise(), "b": Noise(retain=0.2)}
    expected = {name: train(tiny_unet(), objective, TrainConfig(6)) for name, objective in runs.items()}
    work = {name: tmp_path / name for name in runs}

    def kill(name: str, done: int, _: int) -> None:
        if (name, done) == ("a", 4):
            raise Killed

    with pytest.raises(Killed):
        train_together(tiny_unet(), runs, TrainConfig(6), work=work, checkpoint_every=2, progress=kill)
    heard: list[tuple[str, int]] = []
    found = train_together(
        tiny_unet(), runs, TrainConfig(6), work=work, progress=lambda name, done, _: heard.append((name, done))
    )
    assert heard == [("a", 5), ("b", 3), ("a", 6), ("b", 4), ("b", 5), ("b", 6)]
    for name in runs:
        assert_equal(found[name], expected[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": TrainConfig(6, lr=0.5)}, r"same settings, found another \(lr: wanted 0.5"),
        ({"config": TrainConfig(6, trained=("*",))}, "trained: wanted"),
        ({"identity": "other data"}, "identity: wanted 'other data', found 'data'"),
        ({"model": tiny_unet(seed=1)}, "base: wanted"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_stays(change, message, tmp_path: Path) -> None:
    interrupted(3, tiny_unet(), TrainConfig(6), tmp_path, checkpoint_every=2, identity="data")
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    options = {"model": tiny_unet(), "config": TrainConfig(6), "identity": "data", **change}
    with pytest.raises(CheckpointError, match=message):
        train(objective=Noise(), work=tmp_path, **options)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_damaged_checkpoint_ends_its_run_and_no_other(tmp_path: Path) -> None:
    work = {name: tmp_path / name for name in ("good", "bad")}
    work["bad"].mkdir()
    (work["bad"] / "checkpoint.safetensors").write_bytes(b"no checkpoint")
    found = train_together(tiny_unet(), dict.fromkeys(work, Noise()), TrainConfig(2), work=work)
    assert isinstance(found["bad"], CheckpointError) and "bad" in str(found["bad"])
    assert found["good"].steps == 2


@dataclass
class Failing(Noise):
    """Its targets are not finite from the third draw on."""

    drawn: int = 0

    def draw(self, generator: torch.Generator) -> Batch:
        batch = super().draw(generator)
        self.drawn += 1
        if self.drawn > 2:
            batch.forget.target.fill_(torch.inf)
        return batch


def test_a_diverging_run_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    """From which it goes on once the cause is mended."""
    with pytest.raises(FloatingPointError, match="train: the loss must stay finite, got inf at step 2"):
        train(tiny_unet(), Failing(), TrainConfig(4), work=tmp_path, checkpoint_every=1)
    steps: list[int] = []
    found = train(tiny_unet(), Noise(), TrainConfig(4), work=tmp_path, progress=lambda done, _: steps.append(done))
    assert steps == [3, 4]
    assert_equal(found, train(tiny_unet(), Noise(), TrainConfig(4)))


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    """Also while a checkpoint or a line of the log is being written, which happens after every step."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", _KILLED, str(tmp_path)], env=environment, check=True)
    steps: list[int] = []
    config = TrainConfig(60, ema_decay=0.9, warmup_steps=5)
    found = train(
        tiny_unet(), Noise(), config, work=tmp_path / "work", checkpoint_every=1, progress=lambda n, _: steps.append(n)
    )
    assert steps[0] > 8  # each of the eight lives got somewhere
    expected = train(tiny_unet(), Noise(), config)
    assert without_seconds(found) == without_seconds(expected)
    assert_equal(found, expected)


# Modules, also those that a model and an optimiser ask for late, are imported once: a fork of a process that has had no
# backward may have one.
_KILLED = """
import os, pathlib, random, signal, sys, time
import torch
from guda_fast.counterfactuals import TrainConfig, train
from tiny import tiny_unet
from training import Noise
folder, moments = pathlib.Path(sys.argv[1]), random.Random(0)
torch.optim.AdamW(tiny_unet().parameters()).step()
for life in range(8):
    begun = folder / f"begun-{life}"
    child = os.fork()
    if child == 0:
        config = TrainConfig(60, ema_decay=0.9, warmup_steps=5)
        train(tiny_unet(), Noise(), config, work=folder / "work", checkpoint_every=1, progress=lambda *_: begun.touch())
        os._exit(0)
    while not begun.exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it could be killed"
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""
