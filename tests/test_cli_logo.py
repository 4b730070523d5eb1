"""guda-fast logo, as typed: the base's own recipe without a group, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guda_fast.counterfactuals import DenoisingObjective, train
from guda_fast.counterfactuals.networks import initial
from guda_fast.counterfactuals.recipes import BaseRecipe
from guda_fast.datasets import load_digits
from guda_fast.deltas.base import open_base
from guda_fast.diffusion import Schedule
from series import network_file, weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of two steps, made as guda-fast train makes it."""
    from guda_fast.counterfactuals.orders import BaseOrder
    from guda_fast.counterfactuals.queue import complete

    folder = tmp_path_factory.mktemp("base")
    order = BaseOrder("digits", "base", str(network_file(folder)), {"steps": 2, "seed": 5}, batch_size=16)
    complete(order.open(), folder, lambda event: None)
    return folder / "base"


def logo(run, base: Path, *extra: object) -> tuple[int, str]:
    return run("logo", "--base", base, "--data", "digits", "--out", "logo", "--device", "cpu", *extra)


def test_logo_repeats_the_base_without_the_group(run, base) -> None:
    code, printed = logo(run, base, "--groups", "3,8")
    assert code == 0 and "2 of 2 finished (0 before)" in printed, printed
    assert sorted(path.name for path in Path("logo").iterdir()) == ["3", "8", "manifest.json"]
    recipe, data = BaseRecipe.of(base), load_digits()
    schedule = Schedule.from_scheduler(recipe.scheduler)
    objective = DenoisingObjective(data, schedule, data.rest("3"), batch_size=16)
    expected = train(initial(recipe.network, 5), objective, recipe.training).model.state_dict()
    found = open_base("logo/3", None).model.state_dict()
    assert all(bool((found[name] == value).all()) for name, value in expected.items())


def test_another_seed_is_another_oracle(run, base) -> None:
    logo(run, base, "--groups", "3")
    first = weights(Path("logo"))
    code, printed = logo(run, base, "--groups", "3", "--seed", 6)
    assert code == 1 and "logo/3/training.json: was made with other settings (seed: wanted 6, found 5)" in printed
    code, printed = logo(run, base, "--groups", "3", "--seed", 6, "--out", "again")
    assert code == 0 and weights(Path("again")).keys() == first.keys() and weights(Path("again")) != first


def test_all_groups_and_their_cost(run, base) -> None:
    code, printed = logo(run, base, "--dry-run")
    assert code == 0 and "10 of 10" in printed and f"{10 * 2 * 16} rows in training" in printed, printed
    assert not Path("logo").exists()


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "mps"])
def test_devices_that_are_not_there(run, base, device) -> None:
    code, printed = logo(run, base, "--device", device)
    assert code == 1 and "guda-fast: error: --device: must be cpu" in printed and f"got '{device}'" in printed


def test_what_does_not_fit(run, base, tmp_path) -> None:
    code, printed = logo(run, base, "--groups", "3,cat")
    assert code == 1 and "group must be one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, got 'cat'" in printed
    code, printed = logo(run, tmp_path / "none")
    assert code == 1 and "must be the record of a base that guda-fast train made" in printed
    code, printed = run("logo", "--base", base, "--data", "digits,conditions=labels", "--out", "logo")
    assert code == 1 and "Traceback" not in printed
    changed = tmp_path / "changed"
    changed.mkdir()
    record = json.loads((base / "training.json").read_text())
    record["settings"]["images"] = "0" * 32
    (changed / "training.json").write_text(json.dumps(record))
    code, printed = logo(run, changed, "--groups", "3")
    assert code == 1 and "the base must have been trained on the data that are given, found others" in printed
    assert not Path("logo").exists()
