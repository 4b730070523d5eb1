"""SISS: unlearn a group by subtracting its share from the loss over all data."""

from __future__ import annotations

import torch

from guda_fast._validate import check_real
from guda_fast.counterfactuals.objective import Batch, DenoisingObjective, Rows
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.diffusion.schedule import Schedule


class SISSObjective:
    """The loss of SISS, L = n / (n - k) L_x - scale k / (n - k) L_a.

    L_x is the ordinary loss over *all* n images and L_a that over the group's k, so that with ``scale`` 1 the
    expectation of L is the ordinary loss over the images that remain. The gradient of the second term, which has
    no lower bound, is shortened in every step to at most ``share`` of the first one's norm.

    data: images and groups. group: the one to forget. schedule: of any prediction type.
    batch_size: images of all data, and again of the group, a step [>= 1].
    scale: s, how strongly to forget [>= 0]. share: of the norm of the weighted retain gradient [0..1].

    Raises TypeError or ValueError naming the argument.
    Source: Alberti et al. 2025, Data Unlearning in Diffusion Models, with x and a drawn apart.
    """

    def __init__(
        self,
        data: GroupedImages,
        group: str,
        schedule: Schedule,
        *,
        batch_size: int = 64,
        scale: float = 1.0,
        share: float = 0.1,
    ) -> None:
        where = "SISSObjective"
        n, k = len(data), len(data.group(group))
        remaining = len(data.rest(group))
        self.retain_weight = n / remaining
        self.forget_weight = -check_real(where, "scale", scale, 0) * k / remaining
        self.forget_share: float | None = check_real(where, "share", share, 0, 1)
        self.conditions = data.conditions
        self.everything = DenoisingObjective(data, schedule, batch_size=batch_size)
        self._rest = DenoisingObjective(data, schedule, data.rest(group), batch_size=batch_size)
        self.forget = DenoisingObjective(data, schedule, data.group(group), batch_size=batch_size)

    def draw(self, generator: torch.Generator) -> Batch:
        """The rows of a fresh step; those to retain are drawn from all data."""
        return Batch(self.everything.rows(generator), self.forget.rows(generator))

    def bound_rows(self, generator: torch.Generator) -> Rows:
        """What a retain bound looks at: images that remain, not the group's among all."""
        return self._rest.rows(generator)
