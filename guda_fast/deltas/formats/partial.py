"""State dicts with some of a model's parameters: their values replace the base's, and the rest has no difference."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from guda_fast.deltas.diff import BaseTensor
from guda_fast.deltas.weights import Weights

_MOST = 0.5
"""A whole model that lost keys must not pass as a part: the largest share of the base that is taken for one."""


def is_partial(weights: Weights, base: Sequence[BaseTensor]) -> bool:
    """Whether the file holds so few of the base's tensors that the others were left out on purpose."""
    needed = [tensor for tensor in base if not tensor.optional]
    present = sum(not weights.entries.keys().isdisjoint(tensor.names) for tensor in needed)
    return 0 < present <= _MOST * len(needed) and _known(weights, base)


def lacks_keys(weights: Weights, base: Sequence[BaseTensor]) -> bool:
    """Whether keys are missing and all others are the base's: it may be a part, but that must be said."""
    missing = any(not t.optional and weights.entries.keys().isdisjoint(t.names) for t in base)
    return missing and _known(weights, base)


def as_partial(weights: Weights) -> Weights:
    """The same tensors; those that are not there equal the base's."""
    return replace(weights, complete=False)


def _known(weights: Weights, base: Collection[BaseTensor]) -> bool:
    return weights.entries.keys() <= {name for tensor in base for name in tensor.names}
