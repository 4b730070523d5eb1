"""SISS: its loss against a plain loop in float64, its expectation, its gradient."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from guda_fast.counterfactuals import DenoisingObjective, TrainConfig, train
from guda_fast.counterfactuals.bound import _SEED, RetainBound
from guda_fast.counterfactuals.siss import SISSObjective
from guda_fast.datasets import GroupedImages
from operator_cases import BATCH, Affine, assert_loss_is, extreme_schedule, labelled_data, ordinary_loss, slopes
from tiny import Scaled


def test_loss_and_gradient_equal_a_plain_loop() -> None:
    data, schedule = labelled_data(), extreme_schedule()
    n, k, scale = 15, 4, 1.5

    def loop(student, base, generator):
        everything, group = (
            ordinary_loss(data, index, schedule, student, generator) for index in (torch.arange(n), data.group("dog"))
        )
        return n / (n - k) * everything - scale * k / (n - k) * group

    assert_loss_is(lambda: SISSObjective(data, "dog", schedule, batch_size=BATCH, scale=scale), schedule, loop)


def test_the_terms_add_up_to_the_loss_of_what_remains() -> None:
    """Over all n images once and the group's k once, the weighted sum of a constant an image is the rest's mean."""
    data = labelled_data()
    objective = SISSObjective(data, "dog", extreme_schedule())
    losses = torch.rand(len(data), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    combined = objective.retain_weight * losses.mean() + objective.forget_weight * losses[data.group("dog")].mean()
    torch.testing.assert_close(combined, losses[data.rest("dog")].mean())


def test_rows_to_retain_come_from_all_data() -> None:
    data = labelled_data()
    objective = SISSObjective(data, "dog", extreme_schedule(), batch_size=500)
    batch = objective.draw(torch.Generator().manual_seed(0))
    assert set(batch.retain.condition.tolist()) == {0, 1, 2}
    assert set(batch.forget.condition.tolist()) == {1}
    assert objective.forget_share == 0.1


def weighted_gradients(objective: SISSObjective, model: Affine, seed: int) -> tuple[Tensor, Tensor]:
    """Those of the two terms of the first step's loss, as vectors."""
    batch = objective.draw(torch.Generator().manual_seed(seed))
    assert batch.forget is not None
    found = []
    for weight, rows in ((objective.retain_weight, batch.retain), (objective.forget_weight, batch.forget)):
        arguments = objective.conditions.take(rows.condition)
        loss = weight * (model(rows.x_t, rows.t, **arguments)[0] - rows.target).square().mean()
        found.append(torch.cat([slope.flatten() for slope in slopes(model, loss)]))
    return found[0], found[1]


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_forget_gradient_is_there_and_shortened_in_every_step(share: float) -> None:
    # So strong that it is shortened at each of these shares.
    objective = SISSObjective(labelled_data(), "dog", extreme_schedule(), batch_size=BATCH, scale=40.0, share=share)
    lines = [json.loads(line) for line in train(Affine(1), objective, TrainConfig(20, seed=5)).log]
    assert len(lines) == 20
    for line in lines:
        assert line["forget_norm"] > line["retain_norm"]
        assert line["forget_scale"] * line["forget_norm"] == pytest.approx(share * line["retain_norm"])
    retain, forget = weighted_gradients(objective, Affine(1), seed=5)
    joined = retain + share * retain.norm() / forget.norm() * forget
    # Means of 300 products in float32, in another order.
    assert lines[0]["grad_norm"] == pytest.approx(joined.norm().item(), rel=300 * 2**-24)
    assert (lines[0]["retain_norm"], lines[0]["forget_norm"]) == pytest.approx(
        (retain.norm().item(), forget.norm().item()), rel=300 * 2**-24
    )


def test_a_short_forget_gradient_stays_as_it_is() -> None:
    objective = SISSObjective(labelled_data(), "dog", extreme_schedule(), batch_size=BATCH, scale=1e-3)
    lines = [json.loads(line) for line in train(Affine(1), objective, TrainConfig(5, seed=5)).log]
    assert [line["forget_scale"] for line in lines] == [1.0] * 5
    assert all(line["forget_norm"] > 0 for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1}, "scale must be finite and at least 0"),
        ({"share": 1.5}, "share must be between 0 and 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_errors(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        SISSObjective(labelled_data(), "dog", extreme_schedule(), **options)


def test_a_group_that_is_everything() -> None:
    data = GroupedImages(torch.zeros(3, 1, 2, 2), {"all": torch.arange(3)})
    with pytest.raises(ValueError, match="group 'all' holds all 3 images"):
        SISSObjective(data, "all", extreme_schedule())


def test_a_retain_bound_sees_none_of_the_group() -> None:
    """The draws of training are all images', those of the bound the others' alone."""
    images = torch.zeros(8, 1, 2, 2)
    images[:4] = 100.0
    data = GroupedImages(images, {"loud": torch.arange(4)})
    objective = SISSObjective(data, "loud", extreme_schedule(), batch_size=64)
    seen = RetainBound(objective, None, Scaled(1.0), 0)._rows
    own = DenoisingObjective(data, extreme_schedule(), data.rest("loud"), batch_size=64)
    generator = torch.Generator().manual_seed(_SEED)
    for rows in seen:
        expected = own.rows(generator)
        assert torch.equal(rows.x_t, expected.x_t) and torch.equal(rows.target, expected.target)
