"""TRAK, D-TRAK and DAS against closed forms, retraining and plain loops in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conditional import MODELS, conditions_of
from gradient_cases import SCHEDULERS, STEPS, images, noised
from guda_fast.baselines.gradients import METHODS, gradient_attribution, group_scores
from guda_fast.baselines.gradients import attribution as module
from guda_fast.baselines.gradients.projection import _hashes
from guda_fast.datasets import GroupedImages
from guda_fast.diffusion.flow import read_schedule
from tiny import tiny_unet


class Affine(nn.Module):
    """Predicts W x_t + b of the flattened x_t, whatever the timestep."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(8)
        self.weight = nn.Parameter(torch.randn(elements, elements, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(elements, generator=generator, dtype=torch.float64))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return ((sample.flatten(1) @ self.weight.T + self.bias).reshape(sample.shape),)


def dense(method: str, phi: np.ndarray, asked: np.ndarray, error: np.ndarray, damping: float) -> np.ndarray:
    """Scores of images [(N, M)] by the formulas, with an inverse."""
    gram = phi.T @ phi
    inverse = np.linalg.inv(gram + damping * np.trace(gram) / len(gram) * np.eye(len(gram)))
    scores = np.array([[q @ inverse @ x for x in phi] for q in asked])
    if method == "das":
        leverage = np.array([x @ inverse @ x for x in phi])
        return (scores * error / (1 - leverage)) ** 2
    return scores


def closed_form(method: str, model: Affine, draws: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[np.ndarray, float]:
    """The gradient of f by W and b, row by row, and the mean of the draws' errors."""
    elements = len(model.bias)
    weight, bias = np.zeros((elements, elements)), np.zeros(elements)
    errors = []
    w, b = (value.detach().numpy() for value in (model.weight, model.bias))
    for x_t, target, _ in draws:
        x, y = x_t.flatten().numpy(), target.flatten().numpy()
        prediction = w @ x + b
        slope = {"trak": 2 * (prediction - y), "d-trak": 2 * prediction, "das": np.ones(elements)}[method]
        weight += np.outer(slope, x) / (len(draws) * elements)
        bias += slope / (len(draws) * elements)
        errors.append(np.sqrt(np.mean((prediction - y) ** 2)))
    return np.concatenate([weight.ravel(), bias]), float(np.mean(errors))


@pytest.mark.parametrize("kind", list(SCHEDULERS))
@pytest.mark.parametrize("method", METHODS)
def test_an_affine_model_has_the_closed_form(method: str, kind: str) -> None:
    model, scheduler = Affine(4), SCHEDULERS[kind]()
    known, asked = images(30, (1, 2, 2), 1), images(3, (1, 2, 2), 2)
    data = GroupedImages(known, {"a": torch.arange(12), "b": torch.arange(10, 25)})
    found = gradient_attribution(model, scheduler, data, asked, method=method, timesteps=STEPS, seed=5)
    phi, error = zip(*(closed_form(method, model, noised(scheduler, image, 5)) for image in known), strict=True)
    queries = np.stack([closed_form(method, model, noised(scheduler, image, 5))[0] for image in asked])
    scores = dense(method, np.stack(phi), queries, np.array(error), 0.1)
    expected = np.stack([scores[:, :12].sum(axis=1), scores[:, 10:25].sum(axis=1)], axis=1)
    # K of 20 dimensions has a condition of at most 201; it is made, inverted and applied, in 20 sums each.
    np.testing.assert_allclose(found, expected, rtol=0, atol=3 * 20 * 201 * 2.0**-53 * np.abs(scores).sum())
    assert found.dtype == np.float64


def test_das_is_the_change_of_leaving_an_image_out() -> None:
    """Of least squares, whose prediction without an image is known by fitting again."""
    scheduler, steps = SCHEDULERS["noise"](), [50]
    known, asked = images(8, (1, 1, 1), 1), images(3, (1, 1, 1), 2)
    draws = [noised(scheduler, image, 0, steps)[0] for image in known]
    x = np.array([[float(x_t), 1.0] for x_t, _, _ in draws])
    y = np.array([float(target) for _, target, _ in draws])
    fit = np.linalg.lstsq(x, y, rcond=None)[0]
    model = Affine(1)
    with torch.no_grad():
        model.weight.fill_(fit[0])
        model.bias.fill_(fit[1])
    data = GroupedImages(known, {str(i): torch.tensor([i]) for i in range(8)})
    found = gradient_attribution(model, scheduler, data, asked, method="das", timesteps=steps, damping=0)
    q = np.array([[float(noised(scheduler, image, 0, steps)[0][0]), 1.0] for image in asked])
    others = [np.linalg.lstsq(np.delete(x, i, 0), np.delete(y, i), rcond=None)[0] for i in range(8)]
    expected = np.stack([(q @ fit - q @ other) ** 2 for other in others], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def loop(
    method: str, model: nn.Module, draws: list[tuple[Tensor, Tensor, Tensor]], given: dict[str, Any]
) -> tuple[np.ndarray, float]:
    """The same as ``closed_form`` for any model, by one backward a timestep."""
    gradient, errors = 0.0, []
    for x_t, target, time in draws:
        prediction = model(x_t[None], timestep=time, **given, return_dict=False)[0][0]
        value = {"trak": (prediction - target).square(), "d-trak": prediction.square(), "das": prediction}[method]
        parts = torch.autograd.grad(value.mean(), list(model.parameters()))
        gradient = gradient + torch.cat([part.flatten() for part in parts]).numpy() / len(draws)
        errors.append(float((prediction - target).detach().square().mean().sqrt()))
    return np.asarray(gradient), float(np.mean(errors))


def sketch(parameters: int, dimensions: int, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    bucket, sign = (values.numpy() for values in _hashes(parameters, dimensions, seed))
    return lambda gradient: np.bincount(bucket, gradient * sign, minlength=dimensions)


@pytest.mark.parametrize("method", METHODS)
def test_a_unet_gives_what_a_loop_gives(method: str) -> None:
    model, scheduler = tiny_unet().double(), SCHEDULERS["noise"]()
    known, asked = images(12, (1, 8, 8), 1), images(2, (1, 8, 8), 2)
    data = GroupedImages(known, {"a": torch.arange(5), "b": torch.arange(5, 12)})
    options: dict[str, Any] = {"method": method, "timesteps": STEPS, "dimensions": 20, "seed": 3, "batch_size": 5}
    found = gradient_attribution(model, scheduler, data, asked, **options)
    project = sketch(sum(value.numel() for value in model.parameters()), 20, 3)

    def features(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
        gradients, errors = zip(*(loop(method, model, noised(scheduler, x, 3), {}) for x in values), strict=True)
        return np.stack([project(gradient) for gradient in gradients]), np.array(errors)

    phi, error = features(known)
    scores = dense(method, phi, features(asked)[0], error, 0.1)
    expected = np.stack([scores[:, :5].sum(axis=1), scores[:, 5:].sum(axis=1)], axis=1)
    # Float64 all the way; a condition of 201 and some thousand roundings of a network.
    np.testing.assert_allclose(found, expected, rtol=0, atol=201 * 1e4 * 2.0**-53 * np.abs(scores).sum())


@pytest.mark.parametrize("kind", ["classes", "prompts"])
def test_conditions_reach_their_images(kind: str) -> None:
    model, scheduler = MODELS[kind]().double(), SCHEDULERS["noise"]()
    channels: int = model.config.in_channels
    known, asked = images(4, (channels, 8, 8), 1), images(2, (channels, 8, 8), 2)
    of_data, of_queries = conditions_of(kind, [2, 0, 1, 2]), conditions_of(kind, [1, 2])
    data = GroupedImages(known, {"a": torch.tensor([0, 1]), "b": torch.tensor([2, 3])}, of_data)
    options: dict[str, Any] = {"method": "trak", "timesteps": [40, 80], "dimensions": 8, "batch_size": 3}
    found = gradient_attribution(model, scheduler, data, asked, conditions=of_queries, **options)
    project = sketch(sum(value.numel() for value in model.parameters()), 8, 0)
    cpu = torch.device("cpu")

    def features(values: Tensor, conditions: Any) -> np.ndarray:
        rows = [conditions.to(cpu, torch.float64).take(conditions.row[i : i + 1]) for i in range(len(values))]
        pairs = zip(values, rows, strict=True)
        return np.stack([project(loop("trak", model, noised(scheduler, x, 0, [40, 80]), row)[0]) for x, row in pairs])

    scores = dense("trak", features(known, of_data), features(asked, of_queries), np.zeros(4), 0.1)
    expected = np.stack([scores[:, :2].sum(axis=1), scores[:, 2:].sum(axis=1)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=81 * 1e4 * 2.0**-53 * np.abs(scores).sum())


@pytest.fixture(scope="module")
def unet_case() -> tuple[nn.Module, Any, GroupedImages, Tensor]:
    data = GroupedImages(images(9, (1, 8, 8), 1), {"a": torch.arange(4), "b": torch.arange(4, 9)})
    return tiny_unet().double(), SCHEDULERS["noise"](), data, images(3, (1, 8, 8), 2)


@pytest.mark.parametrize("method", METHODS)
def test_batches_and_order_do_not_matter(unet_case, method: str) -> None:
    model, scheduler, data, asked = unet_case
    options: dict[str, Any] = {"method": method, "timesteps": 2, "dimensions": 16}
    found = gradient_attribution(model, scheduler, data, asked, batch_size=1, **options)
    together = gradient_attribution(model, scheduler, data, asked, batch_size=9, **options)
    # A condition of 161 and some thousand roundings of a network, as above.
    bound = 161 * 1e4 * 2.0**-53 * np.abs(found).max()
    np.testing.assert_allclose(together, found, rtol=0, atol=bound)
    turned = GroupedImages(data.images.flip(0), {"b": torch.arange(5), "a": torch.arange(5, 9)})
    other = gradient_attribution(model, scheduler, turned, asked.flip(0), batch_size=4, **options)
    np.testing.assert_allclose(other[::-1, ::-1], found, rtol=0, atol=bound)


def test_a_seed_is_other_noise_and_the_same_one_the_same(unet_case) -> None:
    options: dict[str, Any] = {"method": "trak", "timesteps": 2, "dimensions": 16}
    first, again, other = (gradient_attribution(*unet_case, **options, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other, rtol=0.01)


def test_an_image_counts_most_for_itself(unet_case) -> None:
    """Its gradient is the query's, and with much room no other's is."""
    model, scheduler, data, _ = unet_case
    single = GroupedImages(data.images, {str(i): torch.tensor([i]) for i in range(9)})
    for method in ("trak", "d-trak"):
        found = gradient_attribution(model, scheduler, single, data.images, method=method, dimensions=4096, timesteps=3)
        assert found.argmax(axis=1).tolist() == list(range(9))
        np.testing.assert_allclose(found, found.T, rtol=0, atol=201 * 4096 * 2.0**-53)


def test_the_model_stays_as_it_was_and_progress_is_told(unet_case) -> None:
    model, scheduler, data, asked = unet_case
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows: list[int] = []
    options: dict[str, Any] = {"method": "das", "timesteps": 2, "dimensions": 16, "batch_size": 4}
    gradient_attribution(model, scheduler, data, asked, **options, advance=rows.append)
    assert rows == [8, 8, 2, 6]
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    model.eval()


def test_frozen_parameters_have_no_part() -> None:
    model, scheduler = Affine(4), SCHEDULERS["noise"]()
    data = GroupedImages(images(9, (1, 2, 2), 1), {"a": torch.arange(4), "b": torch.arange(4, 9)})
    model.weight.requires_grad_(False)
    asked = images(2, (1, 2, 2), 2)
    found = gradient_attribution(model, scheduler, data, asked, method="das", timesteps=STEPS, damping=0.5)
    # By b alone the gradient of the mean is the same for every image, so that K^-1 is 4 M (1/16) + lambda there.
    errors = np.array([closed_form("das", model, noised(scheduler, image, 0))[1] for image in data.images])
    gram = 9 / 4
    product = (1 / 4) / (gram + 0.5 * gram / 4)
    expected = (product * errors / (1 - product)) ** 2
    np.testing.assert_allclose(found, np.tile([expected[:4].sum(), expected[4:].sum()], (2, 1)), rtol=1e-12)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("sum", [[5.0, -2.0], [-3.0, 3.0]]),
        ("mean", [[5 / 3, -1.0], [-1.0, 1.5]]),
        ("max", [[4.0, 2.0], [0.0, 3.0]]),
        ("top-k", [[3.0, -1.0], [-0.5, 1.5]]),
        ("positive", [[6.0, 2.0], [0.0, 3.0]]),
    ],
)
def test_groups_by_hand(how: str, expected: list[list[float]]) -> None:
    scores = torch.tensor([[4.0, -1.0, 2.0, -4.0], [-1.0, -2.0, 0.0, 3.0]], dtype=torch.float64)
    members = {"a": torch.tensor([0, 1, 2]), "b": torch.tensor([2, 3])}
    np.testing.assert_allclose(group_scores(scores, members, how, top_k=2), expected, rtol=1e-15)


def test_top_k_of_a_smaller_group_is_its_mean() -> None:
    scores, members = torch.tensor([[4.0, -1.0]]), {"a": torch.tensor([0, 1])}
    assert group_scores(scores, members, "top-k", top_k=10).tolist() == [[1.5]]


def test_a_count_of_timesteps_is_the_middles_of_equal_parts() -> None:
    schedule = read_schedule(SCHEDULERS["noise"]())
    assert module._timesteps(schedule, 4) == [12, 37, 62, 87]
    assert module._timesteps(schedule, 100) == list(range(100))
    assert module._timesteps(schedule, [7, 3]) == [7, 3]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"method": "influence"}, ValueError, "method must be one of 'trak', 'd-trak', 'das', got 'influence'"),
    ({"aggregate": "median"}, ValueError, "aggregate must be one of 'sum', 'mean', 'max', 'top-k', 'positive'"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    ({"dimensions": 0}, ValueError, "dimensions must be between 1 and 2147483647, got 0"),
    ({"damping": -1.0}, ValueError, "damping must be finite and at least 0, got -1.0"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ({"seed": -1}, ValueError, "seed must be between 0 and"),
    ({"timesteps": 0}, ValueError, "timesteps must be between 1 and 100, got 0"),
    ({"timesteps": []}, ValueError, "timesteps must be distinct and at least one, got"),
    ({"timesteps": [3, 3]}, ValueError, "timesteps must be distinct and at least one, got"),
    ({"timesteps": [100]}, ValueError, "timesteps must be between 0 and 99, got 100"),
    ({"queries": torch.zeros(2, 1, 4, 4)}, ValueError, r"queries must have shape \(\*, 1, 2, 2\)"),
    ({"queries": torch.full((2, 1, 2, 2), torch.nan)}, ValueError, "queries must be finite, got NaN or infinity"),
    (
        {"conditions": conditions_of("classes", [0, 1])},
        ValueError,
        "conditions must be given of both queries and data, got those of the queries alone",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    data = GroupedImages(images(5, (1, 2, 2), 1), {"a": torch.arange(5)})
    given: dict[str, Any] = {"method": "trak", "timesteps": 2, "queries": images(2, (1, 2, 2), 2), **options}
    with pytest.raises(error, match=message):
        gradient_attribution(Affine(4), SCHEDULERS["noise"](), data, **given)


def test_conditions_must_be_as_many_as_queries() -> None:
    conditions = conditions_of("classes", [0, 1, 2])
    data = GroupedImages(images(3, (1, 2, 2), 1), {"a": torch.arange(3)}, conditions)
    case = (Affine(4), SCHEDULERS["noise"](), data, images(2, (1, 2, 2), 2))
    with pytest.raises(ValueError, match="conditions must be those of 2 queries, got 3"):
        gradient_attribution(*case, method="trak", conditions=conditions)
    with pytest.raises(ValueError, match="got those of the data alone"):
        gradient_attribution(*case, method="trak")


def test_groups_and_parameters_are_needed() -> None:
    model, asked = Affine(4), images(2, (1, 2, 2), 2)
    none = GroupedImages(asked, {})
    with pytest.raises(ValueError, match="data must have at least one group, got none"):
        gradient_attribution(model, SCHEDULERS["noise"](), none, asked, method="trak")
    data = GroupedImages(asked, {"a": torch.arange(2)})
    with pytest.raises(ValueError, match="model must have parameters that require a gradient, got none"):
        gradient_attribution(model.requires_grad_(False), SCHEDULERS["noise"](), data, asked, method="trak")


def test_a_kernel_without_an_inverse_needs_damping() -> None:
    data = GroupedImages(images(3, (1, 2, 2), 1), {"a": torch.arange(3)})
    message = "damping must let the kernel be inverted, got 0 for 3 images in 20 dimensions"
    with pytest.raises(ValueError, match=message):
        gradient_attribution(Affine(4), SCHEDULERS["noise"](), data, data.images, method="trak", damping=0)


def test_a_gradient_that_is_no_number_is_told() -> None:
    model = Affine(4)
    with torch.no_grad():
        model.bias[0] = torch.inf
    data = GroupedImages(images(3, (1, 2, 2), 1), {"a": torch.arange(3)})
    with pytest.raises(FloatingPointError, match="gradients must be finite, got NaN or infinity for training image 0"):
        gradient_attribution(model, SCHEDULERS["noise"](), data, data.images, method="trak")


def test_what_does_not_fit_memory_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 float64 parameters are 160 bytes an image."""
    data = GroupedImages(images(5, (1, 2, 2), 1), {"a": torch.arange(5)})
    case = (Affine(4), SCHEDULERS["noise"](), data, data.images)
    monkeypatch.setattr(module, "free_bytes", lambda device: 16 * 2**10)
    rows: list[int] = []
    message = (
        "batch_size must let the gradients of its images fit memory, got 200 of 20 parameters, which take 2.98e-05 "
        "GiB, where 1.53e-05 GiB is free on cpu"
    )
    with pytest.raises(ValueError, match=message):
        gradient_attribution(*case, method="trak", batch_size=200, advance=rows.append)
    monkeypatch.setattr(module, "free_bytes", lambda device: 8000)
    message = (
        "dimensions must let features and kernel fit memory, got 20 for 5 images and 5 queries, which take 8.2e-06 "
        "GiB, where 7.45e-06 GiB is free"
    )
    with pytest.raises(ValueError, match=message):
        gradient_attribution(*case, method="trak", advance=rows.append)
    assert rows == []
    # Half of what is free by default, and without a figure no refusal.
    monkeypatch.setattr(module, "free_bytes", lambda device: 1000)
    assert module._batch_size(None, list(case[0].parameters())) == 3
    monkeypatch.setattr(module, "free_bytes", lambda device: None)
    assert module._batch_size(10**9, list(case[0].parameters())) == 10**9
