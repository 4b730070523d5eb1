"""What the engine is measured against, from the usual script to the forwards alone; performance.md calls them R0 to R4.

Each rival is one class, built with a workload, whose ``scores`` gives scores of queries under the base and K models.
"""

from benchmarks.rivals.forwards import BareForwards
from benchmarks.rivals.peft_mixed import PeftMerged, PeftMixed
from benchmarks.rivals.reference_loop import ReferenceLoop
from benchmarks.rivals.tuned import Tuned
from benchmarks.rivals.vmap import StackedModels

__all__ = ["BareForwards", "PeftMerged", "PeftMixed", "ReferenceLoop", "StackedModels", "Tuned"]
