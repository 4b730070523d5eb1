"""EraseDiff: unlearn a group by asking for noise that has nothing to do with its noised images."""

from __future__ import annotations

import torch

from guda_fast._validate import check_real
from guda_fast.counterfactuals.objective import Batch, DenoisingObjective, Rows, condition_of
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.diffusion.schedule import Schedule


class EraseDiffObjective:
    """The loss of EraseDiff, L = L_retain + weight L_forget.

    L_forget is the mean squared error of the prediction on the group's x_t to the ordinary target with fresh
    noise eps' ~ N(0, I) in place of the noise of x_t: eps' for a model that predicts epsilon,
    sqrt(alpha_bar_t) eps' - sqrt(1 - alpha_bar_t) x0 for one that predicts v.

    data: images and groups. group: the one to forget. schedule: must predict epsilon or v; the target of a model
    that predicts x0 has no noise in it. batch_size: forget images, and again retain images, a step [>= 1].
    weight: lambda [>= 0]. retain: see ``DenoisingObjective``.

    Raises TypeError or ValueError naming the argument.
    Source: Wu et al. 2024, Erasing Undesirable Influence in Diffusion Models, as one level of optimisation.
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
        weight: float = 1.0,
        retain: str = "standard",
    ) -> None:
        where = "EraseDiffObjective"
        if schedule.prediction_type == "sample":
            raise ValueError(f"{where}: schedule must predict epsilon or v_prediction, got 'sample'")
        self.forget_weight = check_real(where, "weight", weight, 0)
        self.data, self.conditions = data, data.conditions
        self.forget = data.group(group)
        self.retain = DenoisingObjective(data, schedule, data.rest(group), batch_size=batch_size, retain=retain)

    def draw(self, generator: torch.Generator) -> Batch:
        """The rows of a fresh step."""
        return Batch(self.retain.rows(generator), self._forget_rows(generator))

    def _forget_rows(self, generator: torch.Generator) -> Rows:
        noising = self.retain.noising
        drawn = self.forget[torch.randint(len(self.forget), (self.retain.batch_size,), generator=generator)]
        x0 = self.data.take(drawn)
        t, eps = noising.sample(x0, generator)
        fresh = torch.randn(x0.shape, generator=generator)
        return Rows(noising.noise(x0, eps, t), t, condition_of(self.data, drawn), noising.target(x0, fresh, t))
