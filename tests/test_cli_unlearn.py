"""guda-fast unlearn, as typed: models, packs, controls, what is refused, and a queue that is killed and goes on."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import guda_fast as gf
from guda_fast.counterfactuals.packing import Packer
from guda_fast.counterfactuals.unlearn import unlearn
from guda_fast.datasets import load_digits
from guda_fast.deltas.base import open_base
from series import network_file, weights

SHORT = ("--steps", 2, "--batch-size", 8, "--device", "cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of two steps, made as guda-fast train makes it."""
    from guda_fast.counterfactuals.orders import BaseOrder
    from guda_fast.counterfactuals.queue import complete

    folder = tmp_path_factory.mktemp("base")
    order = BaseOrder("digits", "base", str(network_file(folder)), {"steps": 2}, batch_size=16)
    complete(order.open(), folder, lambda event: None)
    return folder / "base"


def command(base: Path, *extra: object) -> list[object]:
    return ["unlearn", "retrack", "--base", base, "--data", "digits", "--out", "models", *SHORT, *extra]


def test_each_group_is_unlearned_as_gf_unlearn_does_it(run, base) -> None:
    code, printed = run(*command(base, "--groups", "3,8", "--set", "weight=0.5", "--set", "lr=1e-3"))
    assert code == 0 and "2 of 2 finished (0 before) -> models" in printed, printed
    result = unlearn("retrack", base, load_digits(), group="8", steps=2, batch_size=8, weight=0.5, lr=1e-3)
    found = open_base("models/8", None).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in result.model.state_dict().items())
    settings = json.loads(Path("models/8/training.json").read_text())["settings"]
    assert settings["options"]["weight"] == 0.5 and settings["lr"] == 1e-3 and settings["group"] == "8"


def test_models_and_pack_are_the_same_bank(run, base) -> None:
    code, printed = run(*command(base, "--groups", "3", "--pack", "bank.safetensors"))
    assert code == 0, printed
    code, printed = run(*command(base, "--groups", "1,3", "--pack", "bank.safetensors"))
    assert code == 0 and "2 of 2 finished (1 before)" in printed, printed
    packed = gf.DeltaBank.load(base, "bank.safetensors")
    loose = gf.DeltaBank.load(base, {"3": "models/3", "1": "models/1"})
    assert packed.groups == ("3", "1") and packed.hash == loose.hash


def test_a_pack_of_other_models_is_refused(run, base) -> None:
    run(*command(base, "--groups", "3", "--pack", "bank.safetensors"))
    run(*command(base, "--groups", "3", "--seed", 1, "--out", "other"))
    Path("models").rename("first")
    Path("other").rename("models")
    code, printed = run(*command(base, "--groups", "3", "--seed", 1, "--pack", "bank.safetensors"))
    assert code == 1 and "bank.safetensors: group '3' must be the model in models/3, found another" in printed
    code, printed = run(*command(base, "--groups", "3", "--seed", 1, "--pack", "models/bank.safetensors"))
    assert code == 1 and "--pack: must not be among the models" in printed


def test_control_groups_are_unlearned_with_the_groups(run, base) -> None:
    code, printed = run(*command(base, "--groups", "3", "--controls", 2))
    assert code == 0 and "3 of 3 finished" in printed, printed
    names = sorted(path.name for path in Path("models").iterdir())
    assert names == ["3", "control-0", "control-1", "manifest.json"]
    groups = json.loads(Path("models/manifest.json").read_text())["groups"]
    assert groups["control-0"]["control"] is True and groups["control-0"]["count"] == 180


def test_a_conditional_operator(run, tmp_path) -> None:
    data = ("--data", "digits,conditions=labels,null=yes")
    made = ("--network", network_file(tmp_path), "--steps", 2, "--label-dropout", 0.1)
    assert run("train", *data, *made, "--out", "base")[0] == 0
    code, printed = run("unlearn", "esd", "--base", "base", *data, "--out", "models", "--groups", "2", *SHORT)
    assert code == 0, printed
    redirect = ("unlearn", "redirect", "--base", "base", *data, "--out", "redirected", "--groups", "2", *SHORT)
    assert run(*redirect, "--set", 'anchors={"2": {"3": 1, "5": 2}}')[0] == 0
    code, printed = run(*redirect, "--out", "no table", "--set", 'anchors={"3": {"5": 1}}')
    assert code == 1 and "anchors must have every condition of '2', got a table without 2" in printed
    code, printed = run("unlearn", "esd", "--base", "base", "--data", "digits", "--out", "models", *SHORT)
    assert code == 1 and "base: the base must take the conditions of the data" in printed


def test_adapters_made_together_are_a_bank(run, base) -> None:
    lora = ("--groups", "3,8,9", "--set", "lora_rank=2", "--set", "lr=0.01", "--together", 2)
    code, printed = run(*command(base, *lora, "--pack", "bank.safetensors"))
    assert code == 0 and "3 of 3 finished" in printed, printed
    assert Path("models/8/adapter_model.safetensors").is_file()
    bank = gf.DeltaBank.load(base, "bank.safetensors")
    assert {found.kind for found in bank.survey().values()} == {"low-rank"}
    assert bank.hash == gf.DeltaBank.load(base, {name: f"models/{name}" for name in bank.groups}).hash


def test_a_run_that_reaches_its_bound_is_finished_and_says_so(run, base) -> None:
    settings = ("retain_bound=1.5", "bound_every=1", "lr=0.3", "warmup_steps=30")
    bound = (*(word for setting in settings for word in ("--set", setting)), "--steps", 30)
    code, printed = run(*command(base, "--groups", "3", *bound))
    record = json.loads(Path("models/3/training.json").read_text())
    assert code == 0 and record["stopped"] and 0 < record["steps"] < 30 and f"3: {record['stopped']}" in printed


def test_a_run_whose_bound_leaves_nothing_but_the_base_has_failed(run, base) -> None:
    bound = ("--set", "retain_bound=1.0", "--set", "bound_every=1", "--set", "lr=1", "--steps", 5)
    code, printed = run(*command(base, "--groups", "3", *bound))
    assert code == 1 and "0 of 1 finished" in printed
    assert "guda-fast: error: 3: retain loss" in printed and "before any state within it; lower lr" in printed
    assert not Path("models/3").exists()


def test_what_does_not_fit(run, base) -> None:
    for extra, message in {
        ("--groups", "3,cat"): "group must be one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, got 'cat'",
        ("--set", "weigth=1"): "options of retrack must be among mode",
        ("--preset", "best"): "preset must be one of 'default', 'official', got 'best'",
        ("--groups", "3", "--data", "digits,size=9"): "digits takes",
        ("--groups", "3", "--base", "none"): "none",
    }.items():
        code, printed = run(*command(base, *extra))
        assert code == 1 and message in printed and "Traceback" not in printed, printed
        assert not Path("models").exists()
    code, printed = run("unlearn", "forget", *command(base)[2:])
    assert code == 1 and "operator must be one of 'retrack', 'esd', 'siss'" in printed


def test_equal_failures_are_said_once(run, base) -> None:
    code, printed = run(
        *command(
            base, "--groups", "3,8", "--set", "saliency=0.5", "--set", "weight=0", "--set", "trained=cross-attention"
        )
    )
    assert code == 1 and "0 of 2 finished" in printed
    assert "guda-fast: error: 3, 8: train: trained must select parameters of UNet2DModel" in printed


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("weight=-1", "ReTrackObjective: weight must be finite and at least 0, got -1.0"),
        ("weight=abc", "ReTrackObjective: weight must be a real number, got 'abc'"),
        ("lr=abc", "TrainConfig: lr must be a real number, got 'abc'"),
        ("seed=5", "--set: must not be seed, which has an option of its own, --seed"),
        ("batch_size=5", "--set: must not be batch_size, which has an option of its own, --batch-size"),
    ],
)
def test_settings_are_checked_before_anything_is_made(run, base, setting, message) -> None:
    code, printed = run(*command(base, "--groups", "3, 8", "--set", setting))
    assert code == 1 and printed == f"guda-fast: error: {message}\n"
    assert not Path("models").exists()


def test_patterns_of_parameters_are_a_list(run, base) -> None:
    code, printed = run(*command(base, "--groups", "3, 8", "--set", 'trained=["conv_in.*"]'))
    assert code == 0 and "2 of 2 finished" in printed, printed
    changed = {
        name
        for name, value in open_base("models/8", None).model.state_dict().items()
        if not torch.equal(value, open_base(base, None).model.state_dict()[name])
    }
    assert changed and all(name.startswith("conv_in.") for name in changed)
    assert "2 of 2 finished (2 before)" in run(*command(base, "--groups", "3,8", "--set", 'trained=["conv_in.*"]'))[1]


def test_one_folder_is_one_series(run, base) -> None:
    run(*command(base, "--groups", "3"))
    code, printed = run("unlearn", "siss", *command(base, "--groups", "8")[2:])
    assert code == 1 and "models/3/training.json: was made with other settings (" in printed
    assert "operator: wanted 'siss', found 'retrack'" in printed and not Path("models/8").exists()


def test_a_pack_never_keeps_a_model_of_another_run_under_a_groups_name(run, base) -> None:
    packed = ("--groups", "3", "--pack", "bank.safetensors")
    assert run(*command(base, *packed))[0] == 0
    code, printed = run(*command(base, *packed, "--seed", 1, "--out", "other"))
    assert code == 1 and "bank.safetensors: group '3' must be the model in other/3, found another" in printed
    assert not Path("other").exists()


def test_a_model_that_another_command_packs_meanwhile_is_not_taken_for_ours(run, base) -> None:
    assert run(*command(base, "--groups", "3"))[0] == 0
    assert run(*command(base, "--groups", "3", "--seed", 1, "--out", "other"))[0] == 0
    ours, theirs = (Packer(Path("bank.safetensors"), base, Path(out)) for out in ("models", "other"))
    theirs.add(["3"])
    theirs.add(["3"])
    with pytest.raises(gf.CheckpointError, match="group '3' must be the model in models/3, found another"):
        ours.add(["3"])


def test_a_base_of_another_size_is_refused(run, base, tmp_path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    from tiny import tiny_unet

    DDPMPipeline(tiny_unet(size=16), DDPMScheduler()).save_pretrained(tmp_path / "large")
    code, printed = run(*command(tmp_path / "large"))
    assert code == 1 and "large: the base must take the data's 8x8 images, found one for 16x16" in printed


def test_dry_run(run, base) -> None:
    run(*command(base, "--groups", "3"))
    code, printed = run(*command(base, "--set", "retain=distill", "--out", "others", "--dry-run"))
    assert code == 0, printed
    assert "10 of 10" in printed
    # A step has eight images to keep, whose targets the frozen base gives, and eight to forget.
    assert f"{10 * 2 * 16} rows in training, {10 * 2 * 8} of the frozen base" in printed
    code, printed = run(*command(base, "--dry-run"))
    assert "9 of 10" in printed and not Path("others").exists()


# Forks one child a line of arguments, so that all share one import. It kills the child as many seconds after its first
# checkpoint as the line says, or lets it end where that is negative, and answers with the child's wait status. One
# thread: what libgomp starts does not outlive a fork.
SERVER = """
import os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import diffusers.models.unets.unet_2d, safetensors.torch
import guda_fast.counterfactuals.orders, guda_fast.counterfactuals.processes, guda_fast.counterfactuals.packing
from guda_fast.cli import main

def changed(folder, since):
    try:
        return any(path.stat().st_mtime_ns > since for path in folder.rglob("*"))
    except OSError:  # gone between the listing and the look
        return False

for line in sys.stdin:
    seconds, hidden, *arguments = line.rstrip("\\n").split("\\t")
    begin, ended, child = time.time_ns(), 0, os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["guda-fast", *arguments]
        main()
    while float(seconds) >= 0 and not ended and not changed(Path(hidden), begin):
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.002)
    if float(seconds) >= 0 and not ended:
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
    print(status if ended else os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_killed_ten_times_a_queue_goes_on_and_ends_with_the_same_deltas(base, tmp_path) -> None:
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def guda_fast(out: str, seconds: float, together: int = 1) -> int:
        """The wait status: 0, or 9 for a process that was killed."""
        assert server.stdin is not None and server.stdout is not None
        folder = tmp_path / out
        arguments = ["unlearn", "retrack", "--base", base, "--data", "digits", "--out", folder / "models"]
        arguments += ["--groups", "0,1,2,3,4,5", "--steps", 30, "--batch-size", 8, "--device", "cpu"]
        arguments += ["--set", "ema_decay=0.9", "--checkpoint-every", 3, "--together", together]
        arguments += ["--pack", folder / "bank.safetensors"]
        server.stdin.write("\t".join(map(str, (seconds, folder / "models" / ".runs", *arguments))) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    with server:
        assert guda_fast("whole", -1) == 0
        delays = random.Random(7)
        finished = []
        for attempt in range(10):
            assert guda_fast("killed", delays.uniform(0, 0.2), together=1 + attempt % 3) == 9
            finished.append(len(weights(tmp_path / "killed" / "models")))
        assert finished[-1] < 6, "the queue must not have ended before the last kill"
        assert guda_fast("killed", -1) == 0
        assert server.stdin is not None
        server.stdin.close()
    whole, killed = (weights(tmp_path / name / "models") for name in ("whole", "killed"))
    assert len(whole) == 6 and killed == whole
    assert not (tmp_path / "killed" / "models" / ".runs").exists()
    packs = [gf.DeltaBank.load(base, tmp_path / name / "bank.safetensors") for name in ("whole", "killed")]
    assert packs[0].delta_hashes == packs[1].delta_hashes
