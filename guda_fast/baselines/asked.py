"""What all baselines that run the model require of queries beside the training images."""

from __future__ import annotations

import torch
from torch import Tensor

from guda_fast._validate import check_tensor
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.diffusion.conditions import Conditions


def check_asked(where: str, data: GroupedImages, queries: Tensor, conditions: Conditions | None) -> None:
    """Raise TypeError or ValueError naming the argument unless queries are like the training images.

    where: the function that is named. queries: [(N, C, H, W), float32 or float64, finite].
    conditions: of the queries, where the data have some.
    """
    if not data.members:
        raise ValueError(f"{where}: data must have at least one group, got none")
    shape = (None, *data.images.shape[1:])
    check_tensor(where, "queries", queries, shape=shape, dtypes=(torch.float32, torch.float64))
    if not bool(torch.isfinite(queries).all()):
        raise ValueError(f"{where}: queries must be finite, got NaN or infinity")
    if (conditions is None) != (data.conditions is None):
        given = "the data" if conditions is None else "the queries"
        raise ValueError(f"{where}: conditions must be given of both queries and data, got those of {given} alone")
    if conditions is not None and len(conditions) != len(queries):
        raise ValueError(f"{where}: conditions must be those of {len(queries)} queries, got {len(conditions)}")
