"""Executes rows: (query, draw) pairs under the base or a counterfactual."""

from guda_fast.forward.fuse import fuse, fused_blocks, unfuse
from guda_fast.forward.swap import SwapPlan

__all__ = ["SwapPlan", "fuse", "fused_blocks", "unfuse"]
