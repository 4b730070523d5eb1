"""Training data in groups."""

from guda_fast.datasets.digits import load_digits
from guda_fast.datasets.grouped import GroupedImages

__all__ = ["GroupedImages", "load_digits"]
