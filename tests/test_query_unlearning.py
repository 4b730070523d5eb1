"""Query unlearning against a loop in float64 over queries, images and draws."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

import guda_fast as gf
from conditional import MODELS, conditions_of
from guda_fast.baselines import query_unlearning
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.diffusion.conditions import Conditions
from guda_fast.reference.add_noise import add_noise
from tiny import perturbed, tiny_unet

RISE, DAMPING = 0.3, 0.2


def case() -> tuple[gf.DeltaBank, gf.Protocol, GroupedImages, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, queries = (torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1 for count in (5, 3))
    data = GroupedImages(images, {"a": torch.tensor([0, 1, 4]), "b": torch.tensor([2, 3])})
    return *banked(tiny_unet()), data, queries


def banked(base: torch.nn.Module) -> tuple[gf.DeltaBank, gf.Protocol]:
    bank = gf.DeltaBank.load(base, {"unused": perturbed(base)}, scheduler=DDPMScheduler(num_train_timesteps=100))
    return bank, gf.Protocol.from_scheduler(bank.scheduler, start=10, stride=30, weighting="simple")


def test_the_score_is_that_of_a_loop_in_float64() -> None:
    bank, protocol, data, queries = case()
    ids = [7, 2**63 + 5, 11]
    found = query_unlearning(bank, protocol, data, queries, ids, rise=RISE, damping=DAMPING)
    none = Conditions.none(3)
    np.testing.assert_allclose(found, expected(bank, protocol, data, queries, ids, none), rtol=2e-3)


@pytest.mark.parametrize("kind", ["classes", "prompts, added"])
def test_conditions_reach_their_images(kind) -> None:
    bank, protocol = banked(MODELS[kind]())
    generator = torch.Generator().manual_seed(0)
    images, queries = (torch.rand(count, 4, 8, 8, generator=generator) * 2 - 1 for count in (4, 2))
    members = {"a": torch.tensor([0, 1]), "b": torch.tensor([3])}  # the third image is in no group, so in no loss
    data = GroupedImages(images, members, conditions_of(kind, [2, 0, 1, 1]))
    asked, ids = conditions_of(kind, [1, 2]), [5, 6]
    found = query_unlearning(bank, protocol, data, queries, ids, conditions=asked, rise=RISE, damping=DAMPING)
    used = torch.tensor([0, 1, 3])
    used_data = GroupedImages(images[used], {"a": torch.tensor([0, 1]), "b": torch.tensor([2])}, data.conditions[used])
    np.testing.assert_allclose(found, expected(bank, protocol, used_data, queries, ids, asked), rtol=2e-3)
    other = conditions_of(kind, [0, 2])
    changed = query_unlearning(bank, protocol, data, queries, ids, conditions=other, rise=RISE, damping=DAMPING)
    np.testing.assert_allclose(changed[1], found[1], rtol=1e-4)
    assert not np.allclose(changed[0], found[0], rtol=1e-2)
    with pytest.raises(ValueError, match="conditions must be given of both queries and data, got those of the data"):
        query_unlearning(bank, protocol, data, queries, ids)


def expected(bank, protocol, data, queries, ids, conditions) -> np.ndarray:
    given = [arguments(conditions, row) for row in range(len(queries))]
    of_images = data.conditions or Conditions.none(len(data))
    images_given = [arguments(of_images, row) for row in range(len(data))]
    model = copy.deepcopy(bank.model).double().requires_grad_()
    parameters = list(model.parameters())
    images = data.images.double()
    image_ids = list(gf.attribute(data.images, bank, protocol, conditions=data.conditions).query_ids)
    fisher = [torch.zeros_like(parameter) for parameter in parameters]
    for place, image in enumerate(images):
        # The Fisher information's noise is that of the row's number, draw after draw.
        own = draw_loss(model, protocol, image, images_given[place], place, place % protocol.draws)
        for total, gradient in zip(fisher, torch.autograd.grad(own, parameters), strict=True):
            total += (gradient * protocol.draws).square() / len(images)
    floor = DAMPING * torch.cat([part.flatten() for part in fisher]).mean()
    scores = np.zeros((len(queries), 2))
    for row, query in enumerate(queries.double()):
        loss = sum(draw_loss(model, protocol, query, given[row], ids[row], draw) for draw in range(protocol.draws))
        gradients = torch.autograd.grad(loss, parameters)
        step = [gradient / (part + floor) for gradient, part in zip(gradients, fisher, strict=True)]
        slope = sum(float((one * other).sum()) for one, other in zip(gradients, step, strict=True))
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, direction in zip(changed.parameters(), step, strict=True):
                parameter += RISE * float(loss) / slope * direction
            rises = [
                sum(
                    float(draw_loss(changed, protocol, image, own, number, draw))
                    - float(draw_loss(model, protocol, image, own, number, draw))
                    for draw in range(protocol.draws)
                )
                for image, own, number in zip(images, images_given, image_ids, strict=True)
            ]
        scores[row] = [np.mean([rises[place] for place in index]) for index in data.members.values()]
    return scores


def arguments(conditions: Conditions, row: int) -> dict[str, Any]:
    return conditions.to(torch.device("cpu"), torch.float64).take(conditions.row[row : row + 1])


def draw_loss(
    model: torch.nn.Module, protocol: gf.Protocol, image: Tensor, given: dict[str, Any], number: int, draw: int
) -> Tensor:
    table = protocol.table
    counters = (
        torch.zeros(1, dtype=torch.int64),
        torch.from_numpy(np.array([number], dtype=np.uint64).view(np.int64)),
        torch.tensor([int(table.timestep[draw])]),
        torch.tensor([int(table.sample[draw])]),
    )

    def mixed(x0: float, eps: float) -> Tensor:
        scales = torch.tensor([[x0], [eps]], dtype=torch.float64)
        return add_noise(image[None], *counters, *scales, seed=protocol.seed, antithetic=False)

    x_t = mixed(float(table.x0_scale[draw]), float(table.eps_scale[draw]))
    target = mixed(float(table.target_x0_scale[draw]), float(table.target_eps_scale[draw]))
    prediction = model(x_t, torch.tensor([int(table.model_timestep[draw])]), **given, return_dict=False)[0]
    return float(table.weight[draw]) * (prediction - target).square().sum()


def test_blocks_sizes_and_samples_do_not_change_a_query(monkeypatch) -> None:
    bank, protocol, data, queries = case()
    whole = query_unlearning(bank, protocol, data, queries, [1, 2, 3])
    module = importlib.import_module("guda_fast.baselines.query_unlearning")  # its function has the same name
    monkeypatch.setattr(module, "_BLOCK", 2)
    monkeypatch.setattr(module, "_PER_SAMPLE", 2)
    told: list[int] = []
    again = query_unlearning(bank, protocol, data, queries[[2, 0]], [3, 1], batch_size=3, advance=told.append)
    np.testing.assert_allclose(again, whole[[2, 0]], rtol=1e-3)
    assert sum(told) == 5 + 2 * 3 + 3 * 5 * 3  # Fisher, gradients, and the base and two models on five images
    few = query_unlearning(bank, protocol, data, queries, [1, 2, 3], images_per_group=1)
    assert few.shape == whole.shape and not np.allclose(few, whole, rtol=1e-2)


def test_the_loss_of_the_query_itself_rises_by_what_was_asked() -> None:
    bank, protocol, _, queries = case()
    own = GroupedImages(queries, {str(row): torch.tensor([row]) for row in range(3)})
    result = gf.attribute(queries, bank, protocol)
    scores = query_unlearning(bank, protocol, own, queries, result.query_ids, rise=1e-3)
    np.testing.assert_allclose(np.diag(scores) / result.error_base, 1e-3, rtol=0.1)  # to first order


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rise": 0.0}, "rise must be"),
        ({"damping": -1.0}, "damping must be"),
        ({"images_per_group": 0}, "images_per_group must be at least 1, got 0"),
        ({"trained": "cross-attention"}, "trained must select parameters"),
        ({"ids": [1]}, "ids must be those of 3 queries, got 1"),
        ({"queries": torch.zeros(3, 1, 4, 4)}, "queries must have shape"),
    ],
)
def test_bad_input_is_refused(arguments, says) -> None:
    bank, protocol, data, queries = case()
    given = {"queries": queries, "ids": [1, 2, 3]} | arguments
    with pytest.raises(ValueError, match=says):
        query_unlearning(bank, protocol, data, given.pop("queries"), given.pop("ids"), **given)
