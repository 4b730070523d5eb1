"""gradient_attribution(): queries x training images -> scores of groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from guda_fast._memory import free_bytes
from guda_fast._validate import check_choice, check_int, check_real, describe
from guda_fast.baselines.asked import check_asked
from guda_fast.baselines.gradients.features import METHODS, Features, ImageGradients, evaluating, trained
from guda_fast.baselines.gradients.groups import AGGREGATES, group_scores
from guda_fast.baselines.gradients.kernel import image_scores
from guda_fast.baselines.gradients.noised import Draws
from guda_fast.baselines.gradients.projection import Projection
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.diffusion import FlowSchedule, Schedule
from guda_fast.diffusion.conditions import Conditions
from guda_fast.diffusion.flow import read_schedule
from guda_fast.diffusion.schedule import Scheduler

_WHERE = "gradient_attribution"
_DAMPING = 0.1
_CPU_BATCH, _CUDA_BATCH = 8, 32


def gradient_attribution(
    model: nn.Module,
    scheduler: Schedule | FlowSchedule | Scheduler | Mapping[str, Any] | str | Path,
    data: GroupedImages,
    queries: Tensor,
    *,
    method: str,
    conditions: Conditions | None = None,
    timesteps: int | Sequence[int] = 10,
    dimensions: int = 2048,
    damping: float | None = None,
    aggregate: str = "sum",
    top_k: int = 10,
    batch_size: int | None = None,
    seed: int = 0,
    advance: Callable[[int], object] | None = None,
) -> NDArray[np.float64]:
    """Score groups by the gradients of their training images and of the queries at the trained model.

        phi(x) = P^T grad_theta f(x),   K = sum_i phi(x_i) phi(x_i)^T + lambda I
        trak, d-trak:  score(q, i) = phi(q)^T K^-1 phi(x_i)
        das:           score(q, i) = ( phi(q)^T K^-1 phi(x_i) r_i / (1 - h_i) )^2,   h_i = phi(x_i)^T K^-1 phi(x_i)

    f is the mean over timesteps and elements of (eps_theta(x_t, t) - eps)^2 for trak (the training loss), of
    eps_theta(x_t, t)^2 for d-trak, and of eps_theta(x_t, t) for das; r_i is the root mean squared error of eps_theta on
    image i, averaged over timesteps. lambda is ``damping`` times the mean eigenvalue of sum_i phi(x_i) phi(x_i)^T.
    Simplified: one model and no ensemble; TRAK's Q is the identity, as published for diffusion models. DAS is derived
    for the change of every element at every timestep; as its authors' code does, the output becomes its mean and the
    gradients of the timesteps theirs, but they are not scaled to one length before, nor are the errors of an image.

    model: the trained model, called as those of diffusers; gradients are of its parameters that require one. It is in
        eval mode meanwhile, and is not changed.
    scheduler: of the model; see ``Protocol.from_scheduler``.
    data: all training images and their groups; images in no group are in K.
    queries: [(N, C, H, W), float32 or float64, in [-1, 1], C x H x W as the data's]
    method: "trak", "d-trak" or "das"
    conditions: of the queries, for a conditional model; those of the training images are ``data.conditions``.
    timesteps: how many, in the middles of as many equal parts of the schedule, or which [>= 1].
    dimensions: of phi [>= 1]; P is the identity where the model has no more parameters (see `Projection`).
    damping: [>= 0; 0.1 by default].
    aggregate: of a group's images: "sum", "mean", "max", "top-k" (mean of the ``top_k`` highest) or "positive" (sum of
        those above 0). The sum by default: to first order the effect of leaving out a group, which is what GUDA's and
        LOGO's scores measure, is the sum of the effects of its images.
    batch_size: images whose gradients are in memory at once [>= 1; by default 8 on a CPU, 32 on CUDA, fewer where
        memory is short]; activations of as many images at all timesteps come on top.
    seed: of the noise and of P [0..2^64-1].
    advance: called after every batch with its forwards and backwards of one row: timesteps times images.

    Scores do not depend on batch size or company beyond the rounding of the gradients.

    Returns scores [(N, K), float64], groups in the order of ``data.groups``; higher is more influential.
    Raises TypeError or ValueError naming the argument, also where gradients or features do not fit memory, which is
    known beforehand; FloatingPointError where a gradient is NaN or infinite.
    Source: TRAK: Park et al. 2023 (arXiv 2303.14186); D-TRAK: Zheng et al. 2024 (arXiv 2311.00500); DAS: Lin et al.
    2025 (arXiv 2410.18639); the scale of the damping: Grosse et al. 2023 (arXiv 2308.03296).

    >>> data, scheduler = load_digits(), DDPMScheduler.from_pretrained(folder)  # doctest: +SKIP
    >>> gradient_attribution(unet, scheduler, data, queries, method="d-trak").shape  # doctest: +SKIP
    (256, 10)
    """
    check_choice(_WHERE, "method", method, METHODS)
    check_choice(_WHERE, "aggregate", aggregate, AGGREGATES)
    check_int(_WHERE, "top_k", top_k, 1)
    check_int(_WHERE, "seed", seed, 0, 2**64 - 1)
    damping = _DAMPING if damping is None else check_real(_WHERE, "damping", damping, 0)
    check_asked(_WHERE, data, queries, conditions)
    parameters = list(trained(model).values())
    if not parameters:
        raise ValueError(f"{_WHERE}: model must have parameters that require a gradient, got none")
    schedule = scheduler if isinstance(scheduler, Schedule | FlowSchedule) else read_schedule(scheduler)
    steps = _timesteps(schedule, timesteps)
    size = _batch_size(batch_size, parameters)
    _check_features(dimensions, parameters, len(data), len(queries))

    device = parameters[0].device
    draws = Draws(schedule, steps, seed, device=device, dtype=torch.promote_types(parameters[0].dtype, torch.float32))
    projection = Projection([value.numel() for value in parameters], dimensions, seed=seed, device=device)
    features = Features(ImageGradients(model, draws, method), projection, size, advance)
    with evaluating(model):
        known, error = features(data.take, len(data), data.conditions, "training image")
        asked, _ = features(lambda index: queries[index], len(queries), conditions, "query")
    parts = image_scores(method, asked, known, error, damping)
    return torch.cat([group_scores(part, data.members, aggregate, top_k=top_k) for part in parts]).numpy()


def _timesteps(schedule: Schedule | FlowSchedule, timesteps: int | Sequence[int]) -> list[int]:
    """Those given, or the middles of so many equal parts of the schedule."""
    if isinstance(timesteps, int):
        length = len(schedule)
        count = check_int(_WHERE, "timesteps", timesteps, 1, length)
        timesteps = [(2 * part + 1) * length // (2 * count) for part in range(count)]
    found: list[int] = schedule.check_timesteps(timesteps).tolist()
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{_WHERE}: timesteps must be distinct and at least one, got {describe(timesteps)}")
    return found


def _batch_size(wanted: int | None, parameters: Sequence[Tensor]) -> int:
    """How many images' gradients are held at once; refuses more than fit memory, where that is known."""
    device = parameters[0].device
    image = sum(value.nbytes for value in parameters)
    free = free_bytes(device)
    if wanted is None:
        most = _CUDA_BATCH if device.type == "cuda" else _CPU_BATCH
        # The other half is for activations.
        wanted = most if free is None else max(1, min(most, free // (2 * image)))
    size = check_int(_WHERE, "batch_size", wanted, 1)
    if free is not None and size * image > free:
        count = sum(value.numel() for value in parameters)
        raise ValueError(
            f"{_WHERE}: batch_size must let the gradients of its images fit memory, got {size} of {count:,} "
            f"parameters, which take {size * image / 2**30:.3g} GiB, where {free / 2**30:.3g} GiB is free on {device}"
        )
    return size


def _check_features(dimensions: int, parameters: Sequence[Tensor], images: int, queries: int) -> None:
    """Refuse features, of images twice, and a kernel, twice too, that do not fit the memory of the host."""
    check_int(_WHERE, "dimensions", dimensions, 1, 2**31 - 1)
    width = min(dimensions, sum(value.numel() for value in parameters))
    needed, free = 8 * width * (2 * images + queries + 2 * width), free_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise ValueError(
            f"{_WHERE}: dimensions must let features and kernel fit memory, got {width} for {images} images and "
            f"{queries} queries, which take {needed / 2**30:.3g} GiB, where {free / 2**30:.3g} GiB is free"
        )
