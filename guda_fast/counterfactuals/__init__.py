"""Counterfactual models: retrained without a group (LOGO), or unlearned."""

from guda_fast.counterfactuals.retrack import ReTrackObjective
from guda_fast.counterfactuals.trainer import DenoisingObjective, TrainConfig, TrainResult, train

__all__ = ["DenoisingObjective", "ReTrackObjective", "TrainConfig", "TrainResult", "train"]
