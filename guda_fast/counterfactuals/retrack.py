"""ReTrack: unlearn a group by steering its noised images towards their nearest retain neighbours."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from guda_fast._validate import check_choice, check_int, check_real
from guda_fast.counterfactuals.neighbours import retain_neighbours
from guda_fast.counterfactuals.noising import per_image
from guda_fast.counterfactuals.objective import Batch, DenoisingObjective, Rows, condition_of
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.diffusion.schedule import Schedule

MODES = ("paper", "capped", "official")
# Of the neighbours that are in memory at a time: more would not stay in the cache from one operation to the next.
_BLOCK_BYTES = 2**20


class ReTrackObjective:
    """The loss of ReTrack, L = L_retain + weight L_forget, in three modes.

    For a forget image x_f with noise eps, x_t = a x_f + b eps (a = sqrt(alpha_bar_t), b = sqrt(1 - alpha_bar_t)),
    and its K nearest retain images x_r,

        s_r = softmax_r( -|| x_t - a x_r ||^2 / (2 b^2) )
        paper:     target = sum_r s_r (x_t - a x_r) / b
        capped:    target = eps + sum_r s_r clip( (a / b) (x_f - x_r) )
        official:  target = sum_r w_r (eps + clip( (a / b) (x_f - x_r) )),   w_r = p_r / (sum_r p_r + 1e-8)

    and L_forget is the mean squared error of the noise prediction to that target: the noise that explains x_t by
    retain data. clip shortens a vector to norm sqrt(2 kl_cap); p_r = exp(-|| x_t - a x_r ||^2 / (2 b^2)) in
    float32, as the released code has it: for all but small images every p_r underflows, and the target is zero at
    every t. The target of ``paper`` has no bound as t goes to 0, so train with a clipped gradient. Neighbours are
    found once, by Euclidean distance.

    data: images and groups. group: the one to forget. schedule: must predict epsilon.
    batch_size: forget images, and again retain images, a step [>= 1].
    mode: one of ``MODES``. neighbours: K [1..N_r]. weight: lambda [>= 0].
    retain: see ``DenoisingObjective``. kl_cap: of ``capped`` and ``official`` [> 0].
    features: what neighbours are near by, a row an image [(N, D), floating; None for the pixels].

    Raises TypeError or ValueError naming the argument. Source: GUDA (arXiv 2601.22651), GUDA-U.
    """

    retain_weight = 1.0
    forget_share: float | None = None

    def __init__(
        self,
        data: GroupedImages,
        group: str,
        schedule: Schedule,
        *,
        batch_size: int = 64,
        mode: str = "paper",
        neighbours: int = 10,
        weight: float = 0.3,
        retain: str = "standard",
        kl_cap: float = 1.0,
        features: Tensor | None = None,
    ) -> None:
        where = "ReTrackObjective"
        self.forget, rest = data.group(group), data.rest(group)
        self.mode = check_choice(where, "mode", mode, MODES)
        check_int(where, "neighbours", neighbours, 1, len(rest))
        self.forget_weight = check_real(where, "weight", weight, 0)
        self.kl_cap = check_real(where, "kl_cap", kl_cap, sys.float_info.min)
        if schedule.prediction_type != "epsilon":
            raise ValueError(f"{where}: schedule must predict epsilon, got {schedule.prediction_type!r}")
        self.retain = DenoisingObjective(data, schedule, rest, batch_size=batch_size, retain=retain)
        self.data, self.conditions = data, data.conditions
        self.neighbours = retain_neighbours(where, data, group, neighbours, features)

    def draw(self, generator: torch.Generator) -> Batch:
        """The rows of a fresh step."""
        return Batch(self.retain.rows(generator), self._forget_rows(generator))

    def _forget_rows(self, generator: torch.Generator) -> Rows:
        drawn = torch.randint(len(self.forget), (self.retain.batch_size,), generator=generator)
        x0, noising = self.data.take(self.forget[drawn]), self.retain.noising
        t, eps = noising.sample(x0, generator)
        x_t = noising.noise(x0, eps, t)
        parts = drawn, x0, eps, x_t, noising.x0_scale[t], noising.eps_scale[t]
        images = max(1, _BLOCK_BYTES // (4 * x0[0].numel() * self.neighbours.shape[1]))
        target = torch.cat(
            [self._targets(*block) for block in zip(*(part.split(images) for part in parts), strict=True)]
        )
        return Rows(x_t, t, condition_of(self.data, self.forget[drawn]), target)

    def _targets(
        self, drawn: Tensor, x0: Tensor, eps: Tensor, x_t: Tensor, x0_scale: Tensor, eps_scale: Tensor
    ) -> Tensor:
        neighbours = self.data.take(self.neighbours[drawn].flatten()).unflatten(0, (len(drawn), -1))
        if self.mode == "paper":
            return retrack_target(x_t, neighbours, x0_scale, eps_scale)
        literal = self.mode == "official"
        return capped_target(x0, eps, neighbours, x0_scale, eps_scale, kl_cap=self.kl_cap, literal=literal)


def retrack_target(x_t: Tensor, neighbours: Tensor, x0_scale: Tensor, eps_scale: Tensor) -> Tensor:
    """The noise that explains x_t as a mixture of its neighbours (``paper`` in ``ReTrackObjective``).

    x_t: noised forget images [(B, C, H, W), float]. neighbours: [(B, K, C, H, W), float].
    x0_scale, eps_scale: sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t) [(B,), float, in (0, 1)].

    Returns [(B, C, H, W)], same dtype.
    """
    means = _per_neighbour(x0_scale) * neighbours
    share = torch.softmax(_log_likelihood(x_t, means, eps_scale), dim=1)
    mixture = torch.einsum("bk,bkchw->bchw", share, means)
    return (x_t - mixture) / per_image(eps_scale)


def capped_target(
    x0: Tensor,
    eps: Tensor,
    neighbours: Tensor,
    x0_scale: Tensor,
    eps_scale: Tensor,
    *,
    kl_cap: float,
    literal: bool,
) -> Tensor:
    """The true noise with corrections of bounded norm (``capped`` and ``official`` in ``ReTrackObjective``).

    x0, eps: forget images and their noise [(B, C, H, W), float]. neighbours, x0_scale, eps_scale: as in
    ``retrack_target``. kl_cap: half the square of a correction's largest norm [> 0].
    literal: take the weights as the released code does, without the maximum subtracted: they may all be zero.

    Returns [(B, C, H, W)], same dtype.
    """
    x_t = per_image(x0_scale) * x0 + per_image(eps_scale) * eps
    logits = _log_likelihood(x_t, _per_neighbour(x0_scale) * neighbours, eps_scale)
    if literal:
        likelihood = logits.exp()
        share = likelihood / (likelihood.sum(dim=1, keepdim=True) + 1e-8)
    else:
        share = torch.softmax(logits, dim=1)
    corrections = _per_neighbour(x0_scale / eps_scale) * (x0[:, None] - neighbours)
    # A correction of zero gives an infinite factor, which the clamp makes 1.
    shortened = ((2 * kl_cap) ** 0.5 / corrections.flatten(2).norm(dim=2)).clamp(max=1)
    mixture = torch.einsum("bk,bkchw->bchw", share * shortened, corrections)
    return per_image(share.sum(dim=1)) * eps + mixture


def _log_likelihood(x_t: Tensor, means: Tensor, eps_scale: Tensor) -> Tensor:
    """-|| x_t - mean ||^2 / (2 (1 - alpha_bar_t)) of each neighbour [(B, K)]."""
    distance = (x_t[:, None] - means).square().sum(dim=(2, 3, 4))
    return -distance / (2 * eps_scale[:, None].square())


def _per_neighbour(values: Tensor) -> Tensor:
    """One factor an image, shaped to multiply (B, K, C, H, W)."""
    return values[:, None, None, None, None]
