"""Whether a precision gives the scores of float32: a few queries, scored in both."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch

from guda_fast.datasets.queries import QuerySet
from guda_fast.deltas import DeltaBank
from guda_fast.diffusion import Protocol
from guda_fast.diffusion.schedule import FloatArray
from guda_fast.estimators import Full
from guda_fast.forward import POLICIES, Engine, Precision

QUERIES, TIMESTEPS = 8, 8
LARGEST_ERROR = 0.05
LEAST_AGREEMENT = 0.95


@dataclass(frozen=True)
class PrecisionAudit:
    """Scores in a precision, compared with those in float32 on the same draws.

    precision: its name. queries, draws: how many were looked at.
    relative_error: of the worst group, rms(score - score in fp32) / rms(score in fp32) over the queries [>= 0].
    rank_agreement: of all pairs of groups of a query, the share that come in the same order [0..1; 1 for one group].
    """

    precision: str
    queries: int
    draws: int
    relative_error: float
    rank_agreement: float

    @property
    def passed(self) -> bool:
        """Whether every group's scores differ by 5 % at most, and 95 % of the pairs of groups keep their order."""
        return self.relative_error <= LARGEST_ERROR and self.rank_agreement >= LEAST_AGREEMENT

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        return (
            f"{self.queries} queries at {self.draws} draws have a relative error of {self.relative_error:.2%} "
            f"in the worst group (at most {LARGEST_ERROR:.0%} passes) and {self.rank_agreement:.1%} of the pairs of "
            f"groups in fp32's order (at least {LEAST_AGREEMENT:.0%} passes)"
        )


def audit(
    bank: DeltaBank,
    protocol: Protocol,
    queries: QuerySet,
    precision: Precision,
    *,
    device: torch.device,
    plan: str = "auto",
    batch_size: int | None = None,
) -> PrecisionAudit:
    """Score up to 8 of the queries at up to 8 of the timesteps, evenly chosen, in float32 and in ``precision``."""
    steps = _evenly(len(protocol.timesteps), TIMESTEPS)
    # Weights are given by timestep where the protocol names none.
    weighting = protocol.weighting
    if not isinstance(weighting, str):
        weighting = tuple(weighting[step] for step in steps)
    short = replace(protocol, timesteps=tuple(protocol.timesteps[step] for step in steps), weighting=weighting)
    few = queries.distinct(_evenly(len(queries.x0), QUERIES))

    def scores(policy: Precision) -> FloatArray:
        shape = few.x0.shape[1:]
        engine = Engine(
            bank,
            short,
            shape,
            conditions=few.conditions,
            device=device,
            precision=policy,
            plan=plan,
            batch_size=batch_size,
        )
        return Full().run(engine, few, lambda forwards: None).scores

    wide = scores(POLICIES["fp32"])
    try:
        narrow = scores(precision)
    except FloatingPointError:  # it overflows
        return PrecisionAudit(precision.name, len(few.x0), short.draws, float("inf"), 0.0)
    return PrecisionAudit(
        precision.name,
        len(few.x0),
        short.draws,
        max(_relative_error(wide[:, k], narrow[:, k]) for k in range(len(bank))),
        _rank_agreement(wide, narrow),
    )


def _evenly(count: int, most: int) -> list[int]:
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def _relative_error(expected: FloatArray, found: FloatArray) -> float:
    error, scale = np.linalg.norm(found - expected), np.linalg.norm(expected)
    if scale == 0:
        return 0.0 if error == 0 else float("inf")
    return float(error / scale)


def _rank_agreement(expected: FloatArray, found: FloatArray) -> float:
    pairs = list(combinations(range(expected.shape[1]), 2))
    if not pairs:
        return 1.0
    left, right = np.array(pairs).T
    same = np.sign(expected[:, left] - expected[:, right]) == np.sign(found[:, left] - found[:, right])
    return float(same.mean())
