"""What one pass over a group's values finds: its support, its size against the base, what low precision makes of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from guda_fast.deltas.delta import LowRank, Part, TensorHash, part_bytes

_CHUNK = 1 << 16
# What transformer blocks call attn, attn1 or attn2, and the layers of UNets' attention blocks; no feed-forward layers.
_ATTENTION = re.compile(r"(^|\.)(attn\d*\.|attentions\.\d+\.(to_[qkv]|to_out|group_norm|query|key|value|proj_attn)\b)")


@dataclass(frozen=True)
class Survey:
    """What is known of one group's delta once its values were read; made by ``DeltaBank.survey``.

    origin: the file or object that the counterfactual came from
    support: the kind of each part, "dense" or "low-rank", by the first name of the parameter that changed
    hash: of names and bytes of all parts, as ``Delta.hash``
    bytes: the memory that the parts take
    values: the number of values in the tensors that changed
    relative_rms: rms(delta) / rms(theta_0) over the tensors that changed [>= 0; infinity where theta_0 is zero there]
    cosine: for "float16", "bfloat16" and "tf32", the cosine between delta and what is left of it when base and
        counterfactual are rounded, round(theta_0 + delta) - round(theta_0), over the tensors that changed; 1 where
        nothing changed, 0 where nothing is left or a value overflows [-1..1]

    Low-rank parts count as their product in the last three.

    >>> found = Survey("x", {"mid_block.attentions.0.to_q.weight": "dense"}, "", 4, 1, 0.01, {})
    >>> found.kind, found.attention_only
    ('dense', True)
    """

    origin: str
    support: Mapping[str, str]
    hash: str
    bytes: int
    values: int
    relative_rms: float
    cosine: Mapping[str, float]

    @property
    def kind(self) -> str:
        """The kind of all parts, "dense" or "low-rank"; "mixed" where there are both, "none" where nothing changed."""
        kinds = set(self.support.values())
        return "mixed" if len(kinds) > 1 else next(iter(kinds), "none")

    @property
    def attention_only(self) -> bool:
        """Whether something changed, and all of it is in attention layers, by the names that diffusers gives them."""
        return bool(self.support) and all(map(_ATTENTION.search, self.support))


def survey(origin: str, parts: Iterable[tuple[str, Part]], theta_0: Callable[[str], torch.Tensor]) -> Survey:
    """Survey a delta, one part at a time.

    parts: the parts in the order of their names
    theta_0: gives the base's value by name [float32 or float64, on the CPU]
    """
    support: dict[str, str] = {}
    digest, moments = TensorHash(), _Moments()
    size = 0
    for name, part in parts:
        support[name] = "low-rank" if isinstance(part, LowRank) else "dense"
        digest.add_part(name, part)
        size += part_bytes(part)
        base = theta_0(name)
        moments.add(base, part.full(base.shape))
        del part  # the next one is formed in its memory
    moments.finish()
    return Survey(origin, support, digest.hex(), size, moments.values, moments.relative_rms(), moments.cosines())


class _Moments:
    """Sums over all values that changed: squares of base and delta, and the delta times what rounding leaves of it."""

    def __init__(self) -> None:
        self.values = 0
        self._base = self._delta = 0.0
        self._product = dict.fromkeys(_ROUND, 0.0)
        self._rounded = dict.fromkeys(_ROUND, 0.0)
        self._small = torch.empty(2, _CHUNK, dtype=torch.float32, device="cpu")
        self._waiting = 0

    def add(self, base: torch.Tensor, delta: torch.Tensor) -> None:
        if base.stride() != delta.stride():
            base, delta = base.contiguous(), delta.contiguous()
        self.values += base.numel()
        # In chunks that stay in the cache, and because a double of a whole tensor would be its largest copy; small
        # tensors together, because 30 calls a chunk take longer than their values.
        theta, change = _flat(base), _flat(delta)
        if theta.numel() < _CHUNK and theta.dtype == change.dtype == torch.float32:
            if self._waiting + theta.numel() > _CHUNK:
                self.finish()
            waiting = self._small[:, self._waiting : self._waiting + theta.numel()]
            torch.stack((theta, change), out=waiting)
            self._waiting += theta.numel()
            return
        for theta_chunk, change_chunk in zip(theta.split(_CHUNK), change.split(_CHUNK), strict=True):
            self._add(theta_chunk, change_chunk)

    def finish(self) -> None:
        """Add the small tensors that are waiting."""
        self._add(*self._small[:, : self._waiting])
        self._waiting = 0

    def _add(self, theta: torch.Tensor, change: torch.Tensor) -> None:
        moved, true = theta + change, change.double()
        self._base += _square(theta.double())
        self._delta += _square(true)
        for name, rounded in _ROUND.items():
            left = rounded(moved).double() - rounded(theta).double()
            self._product[name] += float(left @ true)
            self._rounded[name] += _square(left)

    def relative_rms(self) -> float:
        if self._base > 0:
            return math.sqrt(self._delta / self._base)
        return math.inf if self._delta > 0 else 0.0

    def cosines(self) -> dict[str, float]:
        return {name: self._cosine(self._product[name], self._rounded[name]) for name in _ROUND}

    def _cosine(self, product: float, rounded: float) -> float:
        if self._delta == 0:
            return 1.0
        if rounded == 0 or not math.isfinite(product):
            return 0.0
        return max(-1.0, min(1.0, product / math.sqrt(self._delta * rounded)))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The values in the order in which they lie in memory, for a tensor without gaps."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _square(values: torch.Tensor) -> float:
    return float(values @ values)


def _tf32(values: torch.Tensor) -> torch.Tensor:
    """Rounded to the 10 bits of mantissa that TF32 has, to nearest, ties to even."""
    bits = values.float().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


_ROUND: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float16": torch.Tensor.half,
    "bfloat16": torch.Tensor.bfloat16,
    "tf32": _tf32,
}
