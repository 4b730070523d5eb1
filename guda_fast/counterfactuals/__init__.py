"""Counterfactual models: retrained without a group (LOGO), or unlearned."""

from guda_fast.counterfactuals.objective import DenoisingObjective, Objective
from guda_fast.counterfactuals.retrack import ReTrackObjective
from guda_fast.counterfactuals.trainer import TrainConfig, TrainResult, train

__all__ = ["DenoisingObjective", "Objective", "ReTrackObjective", "TrainConfig", "TrainResult", "train"]
