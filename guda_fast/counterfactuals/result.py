"""What a training run gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class TrainResult:
    """A trained model and how it came about.

    model: a new module with the trained (or averaged) weights, in eval mode, on the device of the base
    losses: the objective, one a step. retain_losses, forget_losses: its mean squared errors without weights, one a
        step; a step without forget rows has None
    seconds: wall time of the steps, also of those before a resumption
    steps: after how many of the run's steps the model was taken
    stopped: why the run ended early [None for one that went to its end]
    """

    model: nn.Module
    losses: Sequence[float]
    retain_losses: Sequence[float]
    forget_losses: Sequence[float | None]
    seconds: float
    steps: int
    stopped: str | None = None
