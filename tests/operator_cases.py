"""What the tests of unlearning operators share: small data and models, and the draws of a step one image at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from guda_fast import Schedule
from guda_fast.counterfactuals import DenoisingObjective, Objective
from guda_fast.counterfactuals.objective import FromBase, Rows
from guda_fast.datasets import GroupedImages, with_labels

BATCH = 24
GROUPS = ("cat", "dog", "eel")
NULL = len(GROUPS)


def extreme_schedule(prediction_type: str = "epsilon") -> Schedule:
    """Three timesteps, the ends of what networks see: alpha_bar is 0.9999, 0.5 and 0.00005."""
    return Schedule(np.array([1e-4, 0.49995, 0.9999]), prediction_type)


def labelled_data(sizes: tuple[int, ...] = (5, 4, 6), shape: tuple[int, ...] = (2, 3, 2)) -> GroupedImages:
    """Random images with the number of their group as label, and a null label, in an order that mixes groups."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.tensor([group for group, size in enumerate(sizes) for _ in range(size)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.rand((len(labels), *shape), generator=generator) * 2 - 1
    return with_labels(GroupedImages.by_label(images, labels, GROUPS), null=True)


class Affine(nn.Module):
    """Predicts (factor + slope t + shift_c) x_t: a loss is quadratic in its parameters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.factor = nn.Parameter(torch.randn((), generator=generator))
        self.slope = nn.Parameter(torch.randn((), generator=generator))
        self.shift = nn.Parameter(torch.randn(NULL + 1, generator=generator))

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        factor = self.factor + self.slope * timestep + self.shift[class_labels]
        return (factor[:, None, None, None] * sample,)


class Image(NamedTuple):
    """One row of a step: which image, its pixels, its timestep and noise, and x_t = a x0 + b eps."""

    number: int
    x0: Tensor
    t: int
    eps: Tensor
    a: float
    b: float

    @property
    def x_t(self) -> Tensor:
        return self.a * self.x0 + self.b * self.eps


@contextmanager
def float64() -> Iterator[None]:
    """Draws, rows and models are made in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def exact(objective: Objective, schedule: Schedule) -> Objective:
    """With the schedule's scales in float64, so that losses can be compared to 1e-9; within ``float64``."""
    for part in vars(objective).values():
        if isinstance(part, DenoisingObjective):
            noising, steps = part.noising, range(len(schedule))
            noising.x0_scale, noising.eps_scale = map(torch.from_numpy, schedule.scales(steps))
            noising.target_scales = [torch.from_numpy(scale) for scale in schedule.target_scales(steps)]
    return objective


def drawn(data: GroupedImages, index: Tensor, schedule: Schedule, generator: torch.Generator) -> list[Image]:
    """The rows of one ``DenoisingObjective.rows`` again: images, timesteps and noise in this order."""
    numbers = index[torch.randint(len(index), (BATCH,), generator=generator)].tolist()
    t = torch.randint(len(schedule), (BATCH,), generator=generator).tolist()
    noise = torch.randn((BATCH, *data.images.shape[1:]), generator=generator)
    scales = [scale.tolist() for scale in schedule.scales(t)]
    return [
        Image(number, data.images[number].double(), step, eps.double(), a, b)
        for number, step, eps, a, b in zip(numbers, t, noise, *scales, strict=True)
    ]


def predict(model: nn.Module, image: Image, label: int) -> Tensor:
    """The prediction for one row."""
    prediction: Tensor = model(image.x_t[None], torch.tensor([image.t]), class_labels=torch.tensor([label]))[0][0]
    return prediction


def mean_square(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean over rows of the mean squared difference, one row after another."""
    total = torch.zeros(())
    for prediction, target in pairs:
        total = total + (prediction - target).square().sum() / prediction.numel()
    return total / len(pairs)


def objective_loss(objective: Objective, student: nn.Module, base: nn.Module, generator: torch.Generator) -> Tensor:
    """The loss that a trainer makes of an objective's rows."""
    batch = objective.draw(generator)
    assert batch.forget is not None
    losses = []
    for rows in (batch.retain, batch.forget):
        target = rows.target
        if isinstance(target, FromBase):
            mixed = torch.zeros_like(rows.x_t)
            for scale, condition in zip(target.scales, target.conditions, strict=True):
                mixed = mixed + scale * _predict(objective, base, rows, condition)
            target = mixed.detach()
        losses.append((_predict(objective, student, rows, None) - target).square().mean())
    return objective.retain_weight * losses[0] + objective.forget_weight * losses[1]


def _predict(objective: Objective, model: nn.Module, rows: Rows, condition: Tensor | None) -> Tensor:
    assert objective.conditions is not None and rows.condition is not None
    arguments = objective.conditions.take(rows.condition if condition is None else condition)
    prediction: Tensor = model(rows.x_t, rows.t, **arguments)[0]
    return prediction


def slopes(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """The gradient of a loss with respect to all parameters."""
    return list(torch.autograd.grad(loss, list(model.parameters())))


def label(data: GroupedImages, image: Image) -> int:
    """The image's own."""
    assert data.conditions is not None
    return int(data.conditions.row[image.number])


def ordinary_loss(
    data: GroupedImages, index: Tensor, schedule: Schedule, student: nn.Module, generator: torch.Generator
) -> Tensor:
    """The mean squared error of fresh rows to the noise, or what else the schedule says."""
    pairs = []
    for image in drawn(data, index, schedule, generator):
        wanted = {"epsilon": image.eps, "sample": image.x0, "v_prediction": image.a * image.eps - image.b * image.x0}
        pairs.append((predict(student, image, label(data, image)), wanted[schedule.prediction_type]))
    return mean_square(pairs)


def distilled_loss(
    data: GroupedImages,
    index: Tensor,
    schedule: Schedule,
    student: nn.Module,
    base: nn.Module,
    generator: torch.Generator,
) -> Tensor:
    """The mean squared error of fresh rows to what the base predicts."""
    return mean_square(
        [
            (predict(student, image, label(data, image)), predict(base, image, label(data, image)).detach())
            for image in drawn(data, index, schedule, generator)
        ]
    )


def assert_loss_is(
    make: Callable[[], Objective],
    schedule: Schedule,
    loop: Callable[[nn.Module, nn.Module, torch.Generator], Tensor],
) -> None:
    """Loss and gradient of an objective, and of a loop over student, base and the generator in the same state.

    Targets reach 1e2 and their squares 1e4: 1e-9 leaves six digits for sums of a thousand terms.
    """
    with float64():
        student, base = Affine(1), Affine(2)
        loss = objective_loss(exact(make(), schedule), student, base, torch.Generator().manual_seed(5))
        expected = loop(student, base, torch.Generator().manual_seed(5))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(slopes(student, loss), slopes(student, expected), rtol=1e-8, atol=1e-8)
