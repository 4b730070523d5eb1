"""The unlearning operators by name: what each is called with, what it needs, and how it is trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from guda_fast._validate import check_choice
from guda_fast.counterfactuals.erasediff import EraseDiffObjective
from guda_fast.counterfactuals.esd import ESDObjective
from guda_fast.counterfactuals.objective import Objective
from guda_fast.counterfactuals.redirect import RedirectObjective
from guda_fast.counterfactuals.retrack import ReTrackObjective
from guda_fast.counterfactuals.siss import SISSObjective
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.diffusion.schedule import Schedule

_OWN = ("data", "group", "schedule", "batch_size")


@dataclass(frozen=True)
class Preset:
    """A named way to run an operator.

    options: of the objective, where they are not its defaults. batch_size: [>= 1]. training: fields of
    ``TrainConfig``. epochs: passes over the group's images, in whole batches [None: the steps are the caller's]
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    training: Mapping[str, Any] = field(default_factory=dict)
    epochs: int | None = None

    def steps(self, images: int) -> int | None:
        """Optimiser steps for a group of so many images [None: the caller's].

        >>> OPERATORS["retrack"].presets["official"].steps(5000)
        780
        """
        return None if self.epochs is None else self.epochs * max(1, images // self.batch_size)


@dataclass(frozen=True)
class Operator:
    """An unlearning operator.

    objective: its class, called as ``objective(data, group, schedule, *, batch_size, **options)``.
    presets: ways to run it; ``default`` is always there.
    needs: of the data ["conditions": the model is conditional; "null": one of the conditions stands for none;
        "anchors": conditions to redirect the group's to]
    """

    name: str
    objective: Callable[..., Objective]
    presets: Mapping[str, Preset]
    needs: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The objective's options with their defaults.

        >>> OPERATORS["erasediff"].options
        {'weight': 1.0, 'retain': 'standard'}
        """
        parameters = inspect.signature(self.objective).parameters
        return {name: parameter.default for name, parameter in parameters.items() if name not in _OWN}


_DEFAULT = Preset(training={"lr": 1e-4, "grad_clip": 1.0})
# The warm-up is counted in steps, of which the released recipe makes 780 to 1,170: it never reaches its rate.
_OFFICIAL = Preset(
    options={"mode": "official", "weight": 0.03, "neighbours": 10},
    batch_size=128,
    training={"lr": 1e-5, "warmup_steps": 5000, "weight_decay": 1e-4, "grad_clip": 1.0},
    epochs=20,
)

OPERATORS: Mapping[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator("retrack", ReTrackObjective, {"default": _DEFAULT, "official": _OFFICIAL}),
        Operator("esd", ESDObjective, {"default": _DEFAULT}, needs=("conditions", "null")),
        Operator("siss", SISSObjective, {"default": _DEFAULT}),
        Operator("erasediff", EraseDiffObjective, {"default": _DEFAULT}),
        Operator("redirect", RedirectObjective, {"default": _DEFAULT}, needs=("conditions", "anchors")),
    )
}


def make_objective(
    name: str, data: GroupedImages, group: str, schedule: Schedule, *, batch_size: int = 64, **options: Any
) -> Objective:
    """The objective that unlearns a group by an operator.

    name: a key of ``OPERATORS``. data: images and groups. group: the one to forget. schedule: of the base.
    batch_size: forget images, and again retain images, a step [>= 1]. options: see the operator's ``options``.

    Raises TypeError or ValueError naming the argument, the option or the operator, with the choices.

    >>> import numpy as np, torch
    >>> data = GroupedImages(torch.zeros(3, 1, 8, 8), {"cat": torch.tensor([0])})
    >>> schedule = Schedule(np.linspace(1e-4, 0.02, 1000))
    >>> make_objective("retrack", data, "cat", schedule, neighbours=2, mode="capped").forget_weight
    0.3
    """
    operator = OPERATORS[check_choice("make_objective", "name", name, OPERATORS)]
    unknown = [option for option in options if option not in operator.options]
    if unknown:
        raise ValueError(
            f"make_objective: options of {name} must be among {', '.join(operator.options)}, got {', '.join(unknown)}"
        )
    return operator.objective(data, group, schedule, batch_size=batch_size, **options)
