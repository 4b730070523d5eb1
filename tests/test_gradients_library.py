"""TRAK, D-TRAK and DAS against traker, the implementation of TRAK by its authors, image by image."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradient_cases import SCHEDULERS, STEPS, images, noised
from guda_fast.baselines.gradients import METHODS, gradient_attribution
from guda_fast.baselines.gradients.projection import Projection
from guda_fast.datasets import GroupedImages
from tiny import tiny_unet

with warnings.catch_warnings():
    # Escapes in its docstrings, which Python warns of where it compiles the module.
    warnings.simplefilter("ignore")
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import NoOpProjector

SEED, DAMPING, KNOWN, ASKED = 3, 1.0, 24, 3


class SmallNetwork(nn.Module):
    """Two convolutions with the timestep between them: 41 parameters, so that nothing is projected."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.first, self.time = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(1, 2, bias=False)
            self.last = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        shift = self.time(timestep[:, None] / 100)[:, :, None, None]
        return (self.last(torch.tanh(self.first(sample) + shift)),)


class Output(AbstractModelOutput):
    """f of one image, whose rows are x_t, targets and times; the loss is f itself, and so TRAK's Q is the identity."""

    def __init__(self, method: str) -> None:
        self._method = method

    def get_output(
        self, model: nn.Module, weights: Any, buffers: Any, x_t: Tensor, target: Tensor, time: Tensor
    ) -> Tensor:
        prediction = functional_call(model, (weights, buffers), (x_t,), {"timestep": time, "return_dict": False})[0]
        value = {"trak": (prediction - target).square(), "d-trak": prediction.square(), "das": prediction}
        return value[self._method].mean()

    def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Sequence[Tensor]) -> Tensor:
        return torch.ones(len(batch[0]), 1)


class SameProjection(NoOpProjector):
    """Ours, on the library's gradients by name."""

    def __init__(self, projection: Projection) -> None:
        super().__init__(proj_dim=projection.width, device="cpu")
        self._projection = projection

    def project(self, grads: dict[str, Tensor], model_id: int) -> Tensor:
        return self._projection(list(grads.values())).float()


def rows(values: Tensor) -> list[Tensor]:
    """x_t, targets and times of images [(B, T, C, H, W) twice, (B, T)]."""
    found = [[torch.stack(part) for part in zip(*noised(SCHEDULERS["noise"](), x, SEED), strict=True)] for x in values]
    x_t, target, time = (torch.stack(part) for part in zip(*found, strict=True))
    return [x_t.float(), target.float(), time.flatten(1)]


def of_library(
    folder: Path, method: str, model: nn.Module, projector: NoOpProjector, known: Tensor, asked: dict[str, Tensor]
) -> dict[str, NDArray[np.float64]]:
    """Its scores of images [(N, M) each], without the factor that it puts to them."""
    with sdpa_kernel(SDPBackend.MATH):
        library = TRAKer(
            model, Output(method), len(known), str(folder), device="cpu", projector=projector, use_half_precision=False
        )
        library.load_checkpoint(model.state_dict(), model_id=0)
        library.featurize(rows(known), num_samples=len(known))
        # Gradients over the root of their number: scores do not depend on that where lambda is in the same units.
        phi = np.array(library.saver.current_store["grads"], dtype=np.float64)
        gram = phi.T @ phi
        library.score_computer.lambda_reg = DAMPING * float(np.mean(np.diag(gram)))
        library.finalize_features()
        # Its inverse is divided by the mean size of its entries, for the sake of half precision.
        inverse = np.linalg.inv(gram + library.score_computer.lambda_reg * np.eye(len(gram)))
        found = {}
        for name, values in asked.items():
            library.start_scoring_checkpoint(name, model.state_dict(), 0, len(values))
            library.score(rows(values), num_samples=len(values))
            found[name] = np.abs(inverse).mean() * np.array(library.finalize_scores(name), dtype=np.float64).T
    return found


def errors(model: nn.Module, known: Tensor) -> NDArray[np.float64]:
    """r_i: the root mean squared error of each image, averaged over timesteps."""
    found = []
    for x_t, target, time in zip(*rows(known), strict=True):
        with torch.no_grad():
            wrong = model(x_t, timestep=time, return_dict=False)[0] - target
        found.append(float(wrong.square().flatten(1).mean(dim=1).sqrt().mean()))
    return np.array(found)


def projected() -> tuple[nn.Module, NoOpProjector, int]:
    """A UNet of some thousand parameters, with the same sketch on both sides."""
    model = tiny_unet()
    projection = Projection([value.numel() for value in model.parameters()], 40, seed=SEED)
    return model, SameProjection(projection), 40


def whole() -> tuple[nn.Module, NoOpProjector, int]:
    """All parameters of a small network: P is the identity."""
    return SmallNetwork(), NoOpProjector(device="cpu"), 41


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", [projected, whole])
def test_each_image_has_the_score_of_the_library(case: Any, method: str, tmp_path: Path) -> None:
    model, projector, dimensions = case()
    known, asked = images(KNOWN, (1, 8, 8), 1), images(ASKED, (1, 8, 8), 2)
    data = GroupedImages(known, {str(i): torch.tensor([i]) for i in range(KNOWN)})
    options: dict[str, Any] = {"timesteps": STEPS, "dimensions": dimensions, "damping": DAMPING, "seed": SEED}
    found = gradient_attribution(model, SCHEDULERS["noise"](), data, asked, method=method, **options)
    library = of_library(tmp_path, method, model, projector, known, {"queries": asked, "leverage": known})
    expected = library["queries"]
    if method == "das":
        expected = (expected * errors(model, known) / (1 - np.diag(library["leverage"]))) ** 2
    # It keeps all in float32: three products of 41 terms, whose roundings add up as their root, before and after an
    # inverse with a condition of at most 41 / damping + 1.
    bound = 3 * 41**0.5 * (41 / DAMPING + 1) * 2.0**-24
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * np.abs(expected).max())
