"""ESD: unlearn a group by steering its conditions away from what they add to the unconditional prediction."""

from __future__ import annotations

from dataclasses import replace

import torch

from guda_fast._validate import check_int, check_real
from guda_fast.counterfactuals.anchors import conditions_of
from guda_fast.counterfactuals.objective import Batch, DenoisingObjective, FromBase
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.diffusion.conditions import Conditions
from guda_fast.diffusion.schedule import Schedule


class ESDObjective:
    """The loss of ESD, L = L_retain + weight L_forget, for a conditional model.

    With eps_u and eps_c what the base predicts for a noised image of the group under the null condition and under
    the image's own,

        target = eps_u - guidance (eps_c - eps_u)

    and L_forget is the mean squared error of the prediction under the own condition. As the factors of eps_u and
    eps_c have the sum 1, the same holds for predictions of v or x0.

    data: images, groups and conditions. group: the one to forget. schedule: of any prediction type.
    batch_size: forget images, and again retain images, a step [>= 1].
    null: the row of ``data.conditions`` that stands for no condition [None: ``data.null``].
    guidance: w, how far to the other side [>= 0]. weight: lambda [>= 0]. retain: see ``DenoisingObjective``.

    Raises TypeError or ValueError naming the argument.
    Source: Gandikota et al. 2023, Erasing Concepts from Diffusion Models, on noised training images.
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
        null: int | None = None,
        guidance: float = 7.5,
        weight: float = 0.3,
        retain: str = "standard",
    ) -> None:
        where = "ESDObjective"
        given = conditions_of(where, data)
        self.conditions: Conditions | None = given
        null = data.null if null is None else null
        if null is None:
            raise ValueError(f"{where}: null must be given where the data do not name their null condition, got None")
        check_int(where, "null", null, 0, given.count - 1)
        if bool((given.row[data.group(group)] == null).any()):
            raise ValueError(f"{where}: null must not be the condition of an image of {group!r}, got row {null}")
        self.forget_weight = check_real(where, "weight", weight, 0)
        guidance = check_real(where, "guidance", guidance, 0)
        self.retain = DenoisingObjective(data, schedule, data.rest(group), batch_size=batch_size, retain=retain)
        self.forget = DenoisingObjective(data, schedule, data.group(group), batch_size=batch_size)
        self.target = FromBase((1 + guidance, -guidance), (torch.full((batch_size,), null), None))

    def draw(self, generator: torch.Generator) -> Batch:
        """The rows of a fresh step."""
        retain = self.retain.rows(generator)
        return Batch(retain, replace(self.forget.rows(generator), target=self.target))
