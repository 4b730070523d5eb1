"""Counterfactual models: retrained without a group (LOGO), or unlearned."""

from guda_fast.counterfactuals.config import TrainConfig
from guda_fast.counterfactuals.objective import Batch, DenoisingObjective, FromBase, Objective, Rows
from guda_fast.counterfactuals.result import TrainResult
from guda_fast.counterfactuals.retrack import ReTrackObjective
from guda_fast.counterfactuals.trainer import train, train_together

__all__ = [
    "Batch",
    "DenoisingObjective",
    "FromBase",
    "Objective",
    "ReTrackObjective",
    "Rows",
    "TrainConfig",
    "TrainResult",
    "train",
    "train_together",
]
