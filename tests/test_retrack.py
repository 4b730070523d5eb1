"""ReTrack: its modes and neighbours against plain loops in float64, its loss, its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from guda_fast import Schedule
from guda_fast.counterfactuals import ReTrackObjective
from guda_fast.counterfactuals.neighbours import nearest_neighbours
from guda_fast.counterfactuals.operators import OPERATORS
from guda_fast.counterfactuals.retrack import MODES, capped_target, retrack_target
from guda_fast.datasets import GroupedImages, load_digits
from operator_cases import (
    BATCH,
    Image,
    assert_loss_is,
    drawn,
    extreme_schedule,
    labelled_data,
    mean_square,
    ordinary_loss,
    predict,
)

SCHEDULE = Schedule.from_scheduler(DDPMScheduler())


def plain_target(image: Image, neighbours: list[Tensor], mode: str, kl_cap: float) -> Tensor:
    """One image, in Python floats."""
    exponents = [-float((image.x_t - image.a * other).square().sum()) / (2 * image.b**2) for other in neighbours]
    highest = 0.0 if mode == "official" else max(exponents)
    powers = [math.exp(value - highest) for value in exponents]
    total = sum(powers) + (1e-8 if mode == "official" else 0)
    target = torch.zeros_like(image.x_t)
    for power, other in zip(powers, neighbours, strict=True):
        correction = image.a / image.b * (image.x0 - other)
        if mode != "paper" and (norm := float(correction.norm())) > math.sqrt(2 * kl_cap):
            correction = correction * (math.sqrt(2 * kl_cap) / norm)
        target += power / total * (image.eps + correction)
    return target


def nearest(data: GroupedImages, number: int, rest: Tensor, count: int) -> list[Tensor]:
    distance = [float((data.images[number].double() - data.images[r].double()).square().sum()) for r in rest]
    order = sorted(range(len(rest)), key=distance.__getitem__)
    return [data.images[rest[place]].double() for place in order[:count]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("t", [0, 1, 30, 400, 999])
def test_target_equals_a_plain_loop(t: int, mode: str) -> None:
    generator = torch.Generator().manual_seed(t)
    # Small images near each other: also the weights of `official` are then not all zero.
    x0, eps = torch.randn((2, 6, 1, 2, 2), generator=generator, dtype=torch.float64)
    neighbours = x0[:, None] + 0.1 * torch.randn((6, 5, 1, 2, 2), generator=generator, dtype=torch.float64)
    a, b = (float(scale[0]) for scale in SCHEDULE.scales([t]))
    scales = [torch.full((6,), scale, dtype=torch.float64) for scale in (a, b)]
    if mode == "paper":
        found = retrack_target(a * x0 + b * eps, neighbours, *scales)
    else:
        found = capped_target(x0, eps, neighbours, *scales, kl_cap=0.5, literal=mode == "official")
    for i in range(6):
        image = Image(i, x0[i], t, eps[i], a, b)
        # Exponents reach 1e4 at t = 0, where a rounding of 1e-16 relative becomes 1e-12.
        torch.testing.assert_close(found[i], plain_target(image, list(neighbours[i]), mode, 0.5), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradient_equal_a_plain_loop(mode: str) -> None:
    data, schedule = labelled_data(), extreme_schedule()
    forget, rest = data.group("dog"), data.rest("dog")

    def loop(student, base, generator):
        kept = ordinary_loss(data, rest, schedule, student, generator)
        pairs = [
            (predict(student, image, 1), plain_target(image, nearest(data, image.number, rest, 3), mode, 0.8))
            for image in drawn(data, forget, schedule, generator)
        ]
        return kept + 0.7 * mean_square(pairs)

    def make():
        return ReTrackObjective(
            data, "dog", schedule, batch_size=BATCH, mode=mode, neighbours=3, weight=0.7, kl_cap=0.8
        )

    assert_loss_is(make, schedule, loop)


def test_one_neighbour_that_is_the_image_gives_back_the_noise() -> None:
    x0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    signal, sigma = torch.full((3,), 0.6).double(), torch.full((3,), 0.8).double()
    x_t = signal[:, None, None, None] * x0 + sigma[:, None, None, None] * eps
    torch.testing.assert_close(retrack_target(x_t, x0[:, None], signal, sigma), eps)
    torch.testing.assert_close(capped_target(x0, eps, x0[:, None], signal, sigma, kl_cap=1.0, literal=False), eps)


def test_official_asks_for_zero_on_images_of_32x32x3() -> None:
    """The loss is then the mean squared prediction, whatever the neighbours are: the target is exactly zero."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    # Images so near each other that no correction makes a likelihood smaller.
    images = 0.01 * torch.randn((40, 3, 32, 32), generator=generator)
    data = GroupedImages.by_label(images, labels, ("cat", "dog"))
    objective = ReTrackObjective(data, "cat", SCHEDULE, batch_size=256, mode="official")
    forget = objective.draw(generator).forget
    assert forget is not None and isinstance(forget.target, Tensor)
    assert torch.equal(forget.target, torch.zeros(256, 3, 32, 32))


@pytest.mark.parametrize("kl_cap", [0.01, 1.0])
def test_capped_corrections_have_a_bound_at_every_timestep(kl_cap: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn((2, 1000, 1, 4, 4), generator=generator)
    neighbours = torch.randn((1000, 4, 1, 4, 4), generator=generator)
    scales = [torch.from_numpy(scale).float() for scale in SCHEDULE.scales(range(1000))]
    found = capped_target(x0, eps, neighbours, *scales, kl_cap=kl_cap, literal=False)
    norm = (found - eps).flatten(1).norm(dim=1)
    # Adding to eps and taking it away again rounds 16 elements of size 4 by 2^-23 of that at most.
    assert norm.max() <= math.sqrt(2 * kl_cap) * (1 + 1e-6) + 4 * 4 * 2**-23
    assert norm.max() > 0.9 * math.sqrt(2 * kl_cap)


def test_neighbours_equal_a_plain_search() -> None:
    data = load_digits()
    forget, retain = data.take(data.group("3")[:20]), data.take(data.rest("3"))
    found = nearest_neighbours(forget, retain, 4)
    for i, image in enumerate(forget):
        distance = (retain.double() - image.double()).square().sum(dim=(1, 2, 3))
        expected = distance.sort().values[:4]
        torch.testing.assert_close(distance[found[i]], expected)


@pytest.mark.parametrize(
    "candidates",
    [
        0.1 * torch.randn(2000, 512, generator=torch.Generator().manual_seed(0)) + 30,
        # Copies of one image with a little noise, ever more of it.
        torch.rand(3072, generator=torch.Generator().manual_seed(1))
        + torch.arange(60)[:, None] * 1e-5 * torch.randn(60, 3072, generator=torch.Generator().manual_seed(2)),
    ],
)
def test_neighbours_that_are_far_from_zero_are_told_apart(candidates: Tensor) -> None:
    queries = candidates[:30]
    exact = torch.stack([(candidates.double() - query.double()).square().sum(dim=1) for query in queries])
    assert torch.equal(nearest_neighbours(queries, candidates, 10), exact.topk(10, largest=False).indices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_neighbours_of_features_in_half_precision(dtype: torch.dtype) -> None:
    features = torch.arange(8).to(dtype)[:, None]
    assert nearest_neighbours(features[2:3], features, 3)[0].sort().values.tolist() == [1, 2, 3]


def test_neighbours_by_features_are_others() -> None:
    """Features of one number that order the images against their pixels."""
    images = torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 1, 2, 2).contiguous()
    data = GroupedImages(images, {"cat": torch.tensor([0])})
    features = torch.tensor([[0.0], [5], [4], [3], [2], [1]])
    assert ReTrackObjective(data, "cat", SCHEDULE, neighbours=2).neighbours.tolist() == [[1, 2]]
    found = ReTrackObjective(data, "cat", SCHEDULE, neighbours=2, features=features).neighbours
    assert found.tolist() == [[5, 4]]


def test_pixels_in_bytes_have_the_same_neighbours_and_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (12, 1, 4, 4), generator=generator, dtype=torch.uint8)
    members = {"cat": torch.arange(4)}
    rows = [
        ReTrackObjective(GroupedImages(images, members), "cat", SCHEDULE, neighbours=3)
        .draw(torch.Generator().manual_seed(1))
        .forget
        for images in (pixels, pixels.float() / 127.5 - 1)
    ]
    assert rows[0] is not None and rows[1] is not None
    assert torch.equal(rows[0].target, rows[1].target)


def test_the_released_recipe_never_finishes_its_warm_up() -> None:
    preset = OPERATORS["retrack"].presets["official"]
    assert preset.options == {"mode": "official", "weight": 0.03, "neighbours": 10}
    steps = preset.steps(5000)
    assert steps == 780
    assert preset.training["warmup_steps"] > steps
    assert OPERATORS["retrack"].presets["default"].steps(5000) is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"neighbours": 1797}, ValueError, "neighbours must be between 1 and 1615"),
        ({"weight": -1}, ValueError, "weight must be finite and at least 0"),
        ({"mode": "paperish"}, ValueError, "mode must be one of 'paper', 'capped', 'official'"),
        ({"kl_cap": 0}, ValueError, "kl_cap must be finite and at least"),
        ({"retain": "keep"}, ValueError, "retain must be one of 'standard', 'distill'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"features": torch.zeros(5, 2)}, ValueError, r"features must have shape \(1797, \*\)"),
        ({"features": torch.zeros(1797, 2, dtype=torch.int64)}, TypeError, "features must be floating"),
        ({"features": torch.full((1797, 2), torch.nan)}, ValueError, "features must be finite"),
    ],
)
def test_errors(options, error, message) -> None:
    with pytest.raises(error, match=message):
        ReTrackObjective(load_digits(), "1", SCHEDULE, **options)


def test_errors_of_groups_and_schedule() -> None:
    data = load_digits()
    with pytest.raises(ValueError, match="schedule must predict epsilon, got 'sample'"):
        ReTrackObjective(data, "1", Schedule(SCHEDULE.betas, "sample"))
    with pytest.raises(ValueError, match="group must be one of 0, 1, .* got 'eel'"):
        ReTrackObjective(data, "eel", SCHEDULE)
    everything = GroupedImages(data.images, {"all": torch.arange(len(data))})
    with pytest.raises(ValueError, match="group 'all' holds all 1797 images"):
        ReTrackObjective(everything, "all", SCHEDULE)
