"""Training data in groups."""

from guda_fast.datasets.controls import with_controls
from guda_fast.datasets.digits import load_digits
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.datasets.labels import with_labels
from guda_fast.datasets.manifest import manifest
from guda_fast.datasets.opening import open_dataset

__all__ = ["GroupedImages", "load_digits", "manifest", "open_dataset", "with_controls", "with_labels"]
