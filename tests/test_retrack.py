"""ReTrack: its target and neighbours against plain loops in float64, its loss, its gradient, its effect."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from guda_fast import Schedule
from guda_fast.counterfactuals import DenoisingObjective, ReTrackObjective, TrainConfig, train
from guda_fast.counterfactuals.retrack import nearest_neighbours, retrack_target
from guda_fast.datasets import load_digits
from tiny import Scaled, tiny_unet

SCHEDULE = Schedule.from_scheduler(DDPMScheduler())


def plain_target(x_t, neighbours, x0_scale, eps_scale) -> torch.Tensor:
    """One image: softmax with the maximum subtracted, in Python floats."""
    exponents = [-float(((x_t - x0_scale * image) ** 2).sum()) / (2 * eps_scale**2) for image in neighbours.double()]
    powers = [math.exp(value - max(exponents)) for value in exponents]
    target = torch.zeros_like(x_t)
    for power, image in zip(powers, neighbours, strict=True):
        target += power / sum(powers) * (x_t - x0_scale * image) / eps_scale
    return target


@pytest.mark.parametrize("t", [0, 1, 30, 400, 999])
def test_target_equals_a_plain_loop(t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    x0, eps = torch.randn((2, 6, 3, 4, 4), generator=generator, dtype=torch.float64)
    neighbours = torch.randn((6, 5, 3, 4, 4), generator=generator, dtype=torch.float64)
    signal, sigma = (float(scale[0]) for scale in SCHEDULE.scales([t]))
    x_t = signal * x0 + sigma * eps
    found = retrack_target(
        x_t, neighbours, torch.full((6,), signal, dtype=torch.float64), torch.full((6,), sigma, dtype=torch.float64)
    )
    for i in range(6):
        # Exponents reach 1e6 at t = 0, where a rounding of 1e-16 relative becomes 1e-10.
        torch.testing.assert_close(found[i], plain_target(x_t[i], neighbours[i], signal, sigma), rtol=1e-9, atol=1e-9)


def test_one_neighbour_that_is_the_image_gives_back_the_noise() -> None:
    x0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    signal, sigma = torch.full((3,), 0.6).double(), torch.full((3,), 0.8).double()
    x_t = signal[:, None, None, None] * x0 + sigma[:, None, None, None] * eps
    torch.testing.assert_close(retrack_target(x_t, x0[:, None], signal, sigma), eps)


def test_neighbours_equal_a_plain_search() -> None:
    data = load_digits()
    forget, retain = data.only("3")[:20], data.without("3")
    found = nearest_neighbours(forget, retain, 4)
    for i, image in enumerate(forget):
        distance = (retain.double() - image.double()).square().sum(dim=(1, 2, 3))
        expected = distance.sort().values[:4]
        torch.testing.assert_close(distance[found[i]], expected)


def test_loss_is_retain_plus_weighted_forget() -> None:
    """A model of one factor, with the batch drawn again from the same generator state."""
    data = load_digits()
    objective = ReTrackObjective(data.only("1"), data.without("1"), SCHEDULE, batch_size=4, neighbours=3, weight=0.7)
    model = Scaled(0.3)
    loss = objective(model, torch.Generator().manual_seed(5))
    again = torch.Generator().manual_seed(5)
    x_r, _, target_r = objective.retain_objective.batch(again)
    x_f, _, target_f = objective._forget_batch(again)
    factor = 0.3
    expected = ((factor * x_r - target_r) ** 2).mean() + 0.7 * ((factor * x_f - target_f) ** 2).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    slope = (2 * (factor * x_r - target_r) * x_r).mean() + 1.4 * ((factor * x_f - target_f) * x_f).mean()
    torch.testing.assert_close(model.factor.grad, slope)


@pytest.mark.slow
def test_unlearning_raises_the_groups_loss_far_more_than_the_rests() -> None:
    data = load_digits()
    base = train(
        tiny_unet(), DenoisingObjective(data.images, SCHEDULE), TrainConfig(400, lr=3e-3, ema_decay=0.98)
    ).model
    objective = ReTrackObjective(data.only("0"), data.without("0"), SCHEDULE)
    unlearned = train(base, objective, TrainConfig(100, lr=3e-4)).model

    @torch.no_grad()
    def loss(model: torch.nn.Module, images: torch.Tensor) -> float:
        objective = DenoisingObjective(images, SCHEDULE, batch_size=512)
        generator = torch.Generator().manual_seed(0)
        return sum(float(objective(model, generator)) for _ in range(8)) / 8

    forgotten = loss(unlearned, data.only("0")) / loss(base, data.only("0")) - 1
    retained = loss(unlearned, data.without("0")) / loss(base, data.without("0")) - 1
    # A change that does not know the group would raise both alike.
    assert forgotten > 0.5
    assert forgotten > 10 * abs(retained)


def test_errors() -> None:
    data = load_digits()
    forget, retain = data.only("1"), data.without("1")
    with pytest.raises(ValueError, match="neighbours must be between 1 and"):
        ReTrackObjective(forget, retain[:3], SCHEDULE, neighbours=4)
    with pytest.raises(ValueError, match="forget must hold at least one image"):
        ReTrackObjective(forget[:0], retain, SCHEDULE)
    with pytest.raises(ValueError, match="weight must be finite and at least 0"):
        ReTrackObjective(forget, retain, SCHEDULE, weight=-1)
    with pytest.raises(ValueError, match="schedule must predict epsilon, got 'sample'"):
        ReTrackObjective(forget, retain, Schedule(SCHEDULE.betas, "sample"))
