"""Differences with a known truth for tests of racing: not drawn from racing's own model."""

from __future__ import annotations

import numpy as np


def simulated(queries: int, groups: int, draws: int = 40, *, signal: float = 6.0, seed: int = 0) -> np.ndarray:
    """Noise that falls steeply with the draw, log-normal by query, and one group a query with a mean (N, K, D)."""
    rng = np.random.default_rng(seed)
    profile = np.exp(-np.arange(draws) / 6.0)
    noise = rng.laplace(size=(queries, groups, draws)) + rng.normal(size=(queries, groups, 1))
    found = noise * profile * np.exp(rng.normal(0, 0.5, (queries, 1, 1)))
    found[np.arange(queries), rng.integers(groups, size=queries)] += (
        signal * profile * np.exp(rng.normal(0, 0.3, (queries, 1)))
    )
    return found
