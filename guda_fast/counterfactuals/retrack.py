"""ReTrack: unlearn a group by steering its noised images towards their nearest retain neighbours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from guda_fast._validate import check_int, check_real, check_tensor
from guda_fast.counterfactuals.trainer import DenoisingObjective, Noising, per_image, predict
from guda_fast.diffusion.schedule import Schedule

_DISTANCE_BLOCK_BYTES = 2**26


class ReTrackObjective:
    """The loss of ReTrack in ``paper`` mode: L = L_retain + weight L_forget.

    For a forget image x_f noised to x_t, with its K nearest retain images x_r,

        s_r = softmax_r( -|| x_t - sqrt(alpha_bar_t) x_r ||^2 / (2 (1 - alpha_bar_t)) )
        target = sum_r s_r (x_t - sqrt(alpha_bar_t) x_r) / sqrt(1 - alpha_bar_t)

    and L_forget is the mean squared error of the noise prediction to that target: the noise that explains
    x_t by retain data. L_retain is the ordinary loss. The target has no bound as t goes to 0, so train with
    a clipped gradient. Neighbours are found once, by Euclidean distance on pixels, and both halves of a step
    share one forward.

    forget: D_k [(N_k, C, H, W), float32]. retain: D_r [(N_r, C, H, W), float32].
    schedule: must predict epsilon. batch_size: forget images, and again retain images, a step [>= 1].
    neighbours: K [1..N_r]. weight: lambda [>= 0].

    Raises TypeError or ValueError naming the argument. Source: GUDA (arXiv 2601.22651), GUDA-U.
    """

    def __init__(
        self,
        forget: Tensor,
        retain: Tensor,
        schedule: Schedule,
        *,
        batch_size: int = 64,
        neighbours: int = 10,
        weight: float = 0.3,
    ) -> None:
        check_int("ReTrackObjective", "batch_size", batch_size, 1)
        check_tensor("ReTrackObjective", "forget", forget, shape=(None,) * 4, dtypes=(torch.float32,))
        check_tensor("ReTrackObjective", "retain", retain, shape=(None, *forget.shape[1:]), dtypes=(torch.float32,))
        check_int("ReTrackObjective", "neighbours", neighbours, 1, len(retain))
        self.weight = check_real("ReTrackObjective", "weight", weight, 0)
        if len(forget) == 0:
            raise ValueError("ReTrackObjective: forget must hold at least one image, got none")
        if schedule.prediction_type != "epsilon":
            raise ValueError(f"ReTrackObjective: schedule must predict epsilon, got {schedule.prediction_type!r}")
        self.forget, self.retain = forget, retain
        self.neighbours = nearest_neighbours(forget, retain, neighbours)
        self.retain_objective = DenoisingObjective(retain, schedule, batch_size)
        self.noising = Noising(schedule)

    def __call__(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        x_r, t_r, target_r = self.retain_objective.batch(generator)
        x_f, t_f, target_f = self._forget_batch(generator)
        prediction = predict(model, torch.cat([x_r, x_f]), torch.cat([t_r, t_f]), x_r.shape[1])
        retain, forget = prediction.split([len(x_r), len(x_f)])
        loss: Tensor = (retain - target_r).square().mean() + self.weight * (forget - target_f).square().mean()
        return loss

    def _forget_batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.randint(len(self.forget), (self.retain_objective.batch_size,), generator=generator)
        x0 = self.forget[index]
        t, eps = self.noising.sample(x0, generator)
        x_t = self.noising.noise(x0, eps, t)
        neighbours = self.retain[self.neighbours[index]]
        return x_t, t, retrack_target(x_t, neighbours, self.noising.x0_scale[t], self.noising.eps_scale[t])


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
