"""Redirect: unlearn a group of a conditional model by giving its conditions the meaning of others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from guda_fast._validate import check_real
from guda_fast.counterfactuals.anchors import Table, conditions_of, make_anchors
from guda_fast.counterfactuals.objective import Batch, DenoisingObjective, FromBase
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.diffusion.conditions import Conditions
from guda_fast.diffusion.schedule import Schedule


class RedirectObjective:
    """The loss of GUDA-C, L = L_forget + stability L_retain, for a conditional model.

        L_forget = MSE( eps(x_t, t, c_f), eps_0(x_t, t, c_a) )     x_t of the group's images, c_f their conditions
        L_retain = MSE( eps(x_t, t, c_r), eps_0(x_t, t, c_r) )     the images that remain, c_r their conditions

    where eps_0 is the base and c_a an anchor condition, drawn anew for every forget image of every step.

    data: images, groups and conditions. group: the one to forget. schedule: of any prediction type.
    batch_size: forget images, and again retain images, a step [>= 1].
    anchors: where c_a comes from, a name or a table (``guda_fast.counterfactuals.anchors.make_anchors``).
    descriptors, beta, eta: of ``weighted_style`` anchors, as there. stability: lambda_stab [>= 0].

    Raises TypeError or ValueError naming the argument. Source: GUDA (arXiv 2601.22651), GUDA-C.
    """

    forget_weight = 1.0
    forget_share: float | None = None

    def __init__(
        self,
        data: GroupedImages,
        group: str,
        schedule: Schedule,
        *,
        batch_size: int = 64,
        anchors: str | Table = "weighted_style",
        descriptors: Mapping[str, Tensor] | None = None,
        beta: float = 2.0,
        eta: float = 0.3,
        stability: float = 2.0,
    ) -> None:
        where = "RedirectObjective"
        self.conditions: Conditions | None = conditions_of(where, data)
        self.anchors = make_anchors(anchors, data, group, descriptors=descriptors, beta=beta, eta=eta)
        self.retain_weight = check_real(where, "stability", stability, 0)
        self.retain = DenoisingObjective(data, schedule, data.rest(group), batch_size=batch_size, retain="distill")
        self.forget = DenoisingObjective(data, schedule, data.group(group), batch_size=batch_size)

    def draw(self, generator: torch.Generator) -> Batch:
        """The rows of a fresh step."""
        retain, forget = self.retain.rows(generator), self.forget.rows(generator)
        assert forget.condition is not None  # conditions_of has seen them
        anchor = self.anchors.draw(forget.condition, generator)
        return Batch(retain, replace(forget, target=FromBase((1.0,), (anchor,))))
