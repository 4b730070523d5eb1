"""How series are made: networks by name, a base's recipe read back, what a run depends on, and what is refused."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conditional import classed
from guda_fast import CheckpointError
from guda_fast.counterfactuals import DenoisingObjective, TrainConfig
from guda_fast.counterfactuals.networks import NETWORKS, check_fits, find_network, fitted, initial
from guda_fast.counterfactuals.orders import BaseOrder, LogoOrder, UnlearnOrder
from guda_fast.counterfactuals.recipes import (
    BaseRecipe,
    LabelDropout,
    Retraining,
    Unlearning,
    UnlearningRecipe,
    check_trained_on,
    checked_groups,
)
from guda_fast.counterfactuals.runs import write_record
from guda_fast.datasets import GroupedImages, with_controls, with_labels
from guda_fast.datasets.manifest import manifest
from series import NETWORK, network_file, random_groups, schedule
from tiny import tiny_unet

SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 50}


def recipe(data: GroupedImages, **training: object) -> BaseRecipe:
    return BaseRecipe(fitted(NETWORK, data), SCHEDULER, TrainConfig(**{"steps": 3, **training}), batch_size=4)


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "size", "least", "most"), [("digits", 8, 0.69e6, 0.71e6), ("small", 16, 0.68e6, 0.70e6)]
)
def test_networks_by_name(name: str, size: int, least: float, most: float) -> None:
    model = initial(fitted(find_network(name).config, random_groups(size=size)), seed=0)
    assert least < parameters(model) < most
    sample = torch.zeros(1, 1, size, size)
    assert model(sample, torch.zeros(1), return_dict=False)[0].shape == sample.shape


def test_the_network_of_ho_et_al_has_its_published_size() -> None:
    data = GroupedImages(torch.zeros(2, 3, 32, 32), {"a": torch.tensor([0])})
    config = fitted(NETWORKS["ddpm-cifar10"].config, data)
    with torch.device("meta"):
        from diffusers import UNet2DModel

        model = UNet2DModel.from_config(config)
    assert round(parameters(model) / 1e6, 1) == 35.7


def test_first_weights_come_from_the_seed_alone() -> None:
    config = fitted(NETWORK, random_groups())
    state = torch.random.get_rng_state()
    first, again, other = (initial(config, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_a_network_of_labels_has_room_for_all_of_them() -> None:
    data = with_labels(random_groups(3), null=True)
    assert fitted(NETWORK, data)["num_class_embeds"] == 4
    assert fitted(NETWORK, random_groups(3))["num_class_embeds"] is None


def test_networks_from_files(tmp_path: Path) -> None:
    assert find_network(str(network_file(tmp_path))).config == NETWORK
    with pytest.raises(ValueError, match="network: must be one of digits, small, ddpm-cifar10, or a .json file, got"):
        find_network("unet")
    with pytest.raises(FileNotFoundError, match="network: must be a diffusers configuration, found no file"):
        find_network(str(tmp_path / "none.json"))
    (tmp_path / "none.json").write_text('{"_class_name": "Nothing"}')
    with pytest.raises(CheckpointError, match="'_class_name' must be a model of diffusers"):
        fitted(find_network(str(tmp_path / "none.json")).config, random_groups())


def test_a_base_of_other_images_or_conditions_is_refused() -> None:
    data = random_groups()
    check_fits("base", tiny_unet(), data)
    with pytest.raises(CheckpointError, match="must take the data's 1 channels, found one for 3"):
        check_fits("base", tiny_unet(channels=3), data)
    with pytest.raises(CheckpointError, match="must take the data's 8x8 images, found one for 16x16"):
        check_fits("base", tiny_unet(size=16), data)
    with pytest.raises(CheckpointError, match="must take the conditions of the data, found that .* class_labels"):
        check_fits("base", classed(channels=1), data)
    with pytest.raises(CheckpointError, match="must take the conditions of the data"):
        check_fits("base", tiny_unet(), with_labels(data))
    check_fits("base", classed(channels=1), with_labels(data))


def test_the_recipe_of_a_base_is_read_back(tmp_path: Path) -> None:
    data = with_labels(random_groups(), null=True)
    made = replace(recipe(data, ema_decay=0.9, trained=("*norm*",)), label_dropout=0.25)
    series = Retraining(data, made)
    write_record(tmp_path, series.settings("base"))
    assert BaseRecipe.of(tmp_path) == made


@pytest.mark.parametrize("content", [None, "{}", '{"settings": {"steps": 3}}', '{"settings": []}'])
def test_a_base_without_a_recipe_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "training.json").write_text(content)
    with pytest.raises(CheckpointError, match="training.json: must be the record of a base that guda-fast train made"):
        BaseRecipe.of(tmp_path)


def test_logo_leaves_out_the_group_and_nothing_else() -> None:
    data = random_groups()
    series = Retraining(data, recipe(data), ["b"])
    objective = series.objective("b")
    assert isinstance(objective, DenoisingObjective)
    assert objective.index.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    base = Retraining(data, recipe(data))
    wanted = base.settings("base") | {"run": "logo"}
    assert {key: value for key, value in series.settings("b").items() if key not in ("group", "members")} == wanted


def test_label_dropout_shows_the_null_condition_to_a_share_of_images() -> None:
    data = with_labels(random_groups(), null=True)
    count, share = 4000, 0.3
    objective = DenoisingObjective(data, schedule(), batch_size=count)
    dropped = LabelDropout(objective, 3, share).draw(torch.Generator().manual_seed(0)).retain
    plain = objective.draw(torch.Generator().manual_seed(0)).retain
    assert torch.equal(dropped.x_t, plain.x_t)
    assert dropped.condition is not None and plain.condition is not None
    null = dropped.condition == 3
    assert torch.equal(dropped.condition[~null], plain.condition[~null])
    # Five standard deviations of a binomial share.
    assert abs(float(null.double().mean()) - share) < 5 * math.sqrt(share * (1 - share) / count)
    with pytest.raises(ValueError, match="label_dropout: must come with data that have a null condition"):
        Retraining(random_groups(), replace(recipe(random_groups()), label_dropout=0.1))
    with pytest.raises(ValueError, match="label_dropout must be below 1"):
        replace(recipe(random_groups()), label_dropout=1.0)


def unlearning(data: GroupedImages, groups: tuple[str, ...] = ("a",), **options: object) -> Unlearning:
    given = UnlearningRecipe("retrack", steps=2, batch_size=4, options={"neighbours": 2, **options})
    return Unlearning(data, tiny_unet(), given, groups, scheduler=SCHEDULER)


def test_what_an_unlearning_run_depends_on() -> None:
    data = random_groups()
    first = unlearning(data).settings("a")
    assert unlearning(with_controls(data, 2), ("a", "control-1")).settings("a") == first
    assert unlearning(data, weight=0.5).settings("a") != first
    assert unlearning(data, lr=0.5).settings("a") != first
    brighter = replace(data, images=data.images + 0.01)
    assert unlearning(brighter).settings("a") != first
    moved = replace(data, members={**data.members, "a": torch.tensor([0, 1])})
    assert unlearning(moved).settings("a") != first
    json.dumps(first)


def test_what_decides_a_redirection() -> None:
    """Anchors come from the other groups: regrouping them makes another run, adding control groups does not."""
    data = with_labels(random_groups(3), null=True)

    def settings(data: GroupedImages, operator: str) -> dict[str, object]:
        given = UnlearningRecipe(operator, steps=2, batch_size=4)
        return Unlearning(data, classed(channels=1), given, ("a",), scheduler=SCHEDULER).settings("a")

    merged = {**data.members, "b": torch.arange(4, 12)}
    del merged["c"]
    regrouped = replace(data, members=merged)
    assert settings(regrouped, "redirect") != settings(data, "redirect")
    assert settings(regrouped, "retrack") == settings(data, "retrack")
    assert settings(with_controls(data, 2), "redirect") == settings(data, "redirect")
    removed = replace(data, removed=torch.tensor([3, 3, 3, 3]))
    assert settings(removed, "redirect") != settings(data, "redirect")


def test_tensors_among_options_are_told_apart_by_their_values() -> None:
    data = random_groups()
    features = torch.rand(12, 3)
    first, second = (unlearning(data, features=given).settings("a") for given in (features, features + 1))
    assert json.dumps(first) != json.dumps(second)
    assert unlearning(data, features=features.clone()).settings("a") == first


def test_a_base_may_be_unlearned_with_anchors_that_its_training_did_not_know(tmp_path: Path) -> None:
    data = with_labels(random_groups(), null=True)
    write_record(tmp_path, Retraining(data, recipe(data)).settings("base"))
    check_trained_on(tmp_path, manifest(replace(data, removed=torch.tensor([3, 3, 3, 3]))))
    with pytest.raises(CheckpointError, match="must have been trained on the data that are given"):
        check_trained_on(tmp_path, manifest(with_labels(random_groups())))


def test_presets_and_options_of_unlearning() -> None:
    given = UnlearningRecipe("retrack", "official", options={"kl_cap": 2.0, "seed": 7})
    assert given.operator_options()["mode"] == "official" and given.operator_options()["kl_cap"] == 2.0
    assert given.training(5000).steps == 780 and given.training(5000).seed == 7
    assert given.images_a_step == 128
    assert UnlearningRecipe("retrack").training(5000).steps == 300
    with pytest.raises(ValueError, match="unlearn: operator must be one of 'retrack', .*got 'forget'"):
        UnlearningRecipe("forget")
    with pytest.raises(ValueError, match="unlearn: preset must be one of 'default', 'official', got 'best'"):
        UnlearningRecipe("retrack", "best")
    with pytest.raises(ValueError, match="options of retrack must be among mode, .*lr, .*got weigth, lambda"):
        UnlearningRecipe("retrack", options={"weigth": 1, "weight": 1, "lambda": 1})


def test_groups_that_cannot_be_left_out() -> None:
    data = random_groups()
    everything = replace(data, members={**data.members, "all of it": torch.arange(12), ".hidden": torch.arange(2)})
    assert checked_groups(data, ["c", "a"]) == ("c", "a")
    for groups, message in {
        ("d",): "group must be one of a, b, c, got 'd'",
        ("a", "a"): "groups: must be distinct names, got a, a",
        (): "groups: must be distinct names, got none",
    }.items():
        with pytest.raises(ValueError, match=message):
            checked_groups(data, groups)
    with pytest.raises(ValueError, match="group 'all of it' holds all 12 images, nothing remains without it"):
        checked_groups(everything, ["a", "all of it"])
    with pytest.raises(ValueError, match="groups: names must be usable as those of folders, got '.hidden'"):
        checked_groups(everything, [".hidden"])


@pytest.mark.parametrize(
    "order",
    [
        BaseOrder("digits", "base", training={"steps": 2}),
        LogoOrder(Path("base"), "digits", seed=3),
        UnlearnOrder(Path("base"), "digits", UnlearningRecipe("siss", options={"lr": 0.1}), controls=2),
    ],
)
def test_orders_reach_other_processes(order: object) -> None:
    assert pickle.loads(pickle.dumps(order)) == order  # noqa: S301 (made here)
