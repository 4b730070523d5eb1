"""Executes rows: (query, draw) pairs under the base or a counterfactual."""

from guda_fast.diffusion.conditions import Conditions
from guda_fast.forward._routing import RowModels
from guda_fast.forward.batched import BatchedModel
from guda_fast.forward.batches import Advance
from guda_fast.forward.engine import Engine
from guda_fast.forward.fuse import fuse, fused_blocks, unfuse
from guda_fast.forward.noised import NoisedQueries
from guda_fast.forward.plan import PLANS, Choice
from guda_fast.forward.precision import POLICIES, SAFE_COSINE, Precision, fastest_first, policy
from guda_fast.forward.rows import BASE, Rows

__all__ = [
    "BASE",
    "PLANS",
    "POLICIES",
    "SAFE_COSINE",
    "Advance",
    "BatchedModel",
    "Choice",
    "Conditions",
    "Engine",
    "NoisedQueries",
    "Precision",
    "RowModels",
    "Rows",
    "fastest_first",
    "fuse",
    "fused_blocks",
    "policy",
    "unfuse",
]
