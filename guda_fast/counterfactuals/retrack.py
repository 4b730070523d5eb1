"""ReTrack: unlearn a group by steering its noised images towards their nearest retain neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from guda_fast._validate import check_int, check_real
from guda_fast.counterfactuals.noising import per_image
from guda_fast.counterfactuals.objective import Batch, DenoisingObjective, Rows, condition_of
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.diffusion.schedule import Schedule

_DISTANCE_BLOCK_BYTES = 2**26


class ReTrackObjective:
    """The loss of ReTrack in ``paper`` mode: L = L_retain + weight L_forget.

    For a forget image x_f noised to x_t, with its K nearest retain images x_r,

        s_r = softmax_r( -|| x_t - sqrt(alpha_bar_t) x_r ||^2 / (2 (1 - alpha_bar_t)) )
        target = sum_r s_r (x_t - sqrt(alpha_bar_t) x_r) / sqrt(1 - alpha_bar_t)

    and L_forget is the mean squared error of the noise prediction to that target: the noise that explains
    x_t by retain data. L_retain is the ordinary loss. The target has no bound as t goes to 0, so train with
    a clipped gradient. Neighbours are found once, by Euclidean distance on pixels.

    data: images and groups. group: the one to forget. schedule: must predict epsilon.
    batch_size: forget images, and again retain images, a step [>= 1].
    neighbours: K [1..N_r]. weight: lambda [>= 0]. retain: see ``DenoisingObjective``.

    Raises TypeError or ValueError naming the argument. Source: GUDA (arXiv 2601.22651), GUDA-U.
    """

    retain_weight, forget_share = 1.0, None

    def __init__(
        self,
        data: GroupedImages,
        group: str,
        schedule: Schedule,
        *,
        batch_size: int = 64,
        neighbours: int = 10,
        weight: float = 0.3,
        retain: str = "standard",
    ) -> None:
        where = "ReTrackObjective"
        self.forget, rest = data.group(group), data.rest(group)
        check_int(where, "neighbours", neighbours, 1, len(rest))
        self.forget_weight = check_real(where, "weight", weight, 0)
        if schedule.prediction_type != "epsilon":
            raise ValueError(f"{where}: schedule must predict epsilon, got {schedule.prediction_type!r}")
        self.retain = DenoisingObjective(data, schedule, rest, batch_size=batch_size, retain=retain)
        self.data, self.conditions = data, data.conditions
        self.neighbours = rest[nearest_neighbours(data.take(self.forget), data.take(rest), neighbours)]

    def draw(self, generator: torch.Generator) -> Batch:
        """The rows of a fresh step."""
        return Batch(self.retain.rows(generator), self._forget_rows(generator))

    def _forget_rows(self, generator: torch.Generator) -> Rows:
        drawn = torch.randint(len(self.forget), (self.retain.batch_size,), generator=generator)
        x0, noising = self.data.take(self.forget[drawn]), self.retain.noising
        t, eps = noising.sample(x0, generator)
        x_t = noising.noise(x0, eps, t)
        neighbours = self.data.take(self.neighbours[drawn].flatten()).unflatten(0, (len(drawn), -1))
        target = retrack_target(x_t, neighbours, noising.x0_scale[t], noising.eps_scale[t])
        return Rows(x_t, t, condition_of(self.data, self.forget[drawn]), target)


def retrack_target(x_t: Tensor, neighbours: Tensor, x0_scale: Tensor, eps_scale: Tensor) -> Tensor:
    """The noise that explains x_t as a mixture of its neighbours (formula: ``ReTrackObjective``).

    x_t: noised forget images [(B, C, H, W), float]. neighbours: [(B, K, C, H, W), float].
    x0_scale, eps_scale: sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t) [(B,), float, in (0, 1)].

    Returns [(B, C, H, W)], same dtype.
    """
    means = x0_scale[:, None, None, None, None] * neighbours
    distance = (x_t[:, None] - means).square().sum(dim=(2, 3, 4))
    share = torch.softmax(-distance / (2 * eps_scale[:, None].square()), dim=1)
    mixture = torch.einsum("bk,bkchw->bchw", share, means)
    return (x_t - mixture) / per_image(eps_scale)


def nearest_neighbours(queries: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The ``count`` nearest candidates of each query by Euclidean distance, nearest first [(N, count), int64]."""
    flat_queries, flat_candidates = queries.flatten(1), candidates.flatten(1)
    rows = max(1, _DISTANCE_BLOCK_BYTES // (flat_candidates.element_size() * len(flat_candidates)))
    blocks = [torch.cdist(block, flat_candidates).topk(count, largest=False) for block in flat_queries.split(rows)]
    return torch.cat([block.indices for block in blocks])
