"""How scores are reached: all draws (Full), as few as a decision takes (Racing, Tree), or a fixed number (Budget)."""

from guda_fast.estimators.budget import Budget
from guda_fast.estimators.cells import Cells
from guda_fast.estimators.differences import ArrayDifferences, Differences, EngineDifferences
from guda_fast.estimators.full import Full
from guda_fast.estimators.pilot import Pilot
from guda_fast.estimators.racing import Racing
from guda_fast.estimators.tree import Tree

__all__ = ["ArrayDifferences", "Budget", "Cells", "Differences", "EngineDifferences", "Full", "Pilot", "Racing", "Tree"]
