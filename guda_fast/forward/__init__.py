"""Executes rows: (query, draw) pairs under the base or a counterfactual."""

from guda_fast.forward.swap import SwapPlan

__all__ = ["SwapPlan"]
