"""Student's t distribution, and the bound of an error rate; scipy is imported when the first race asks."""

from __future__ import annotations

import numpy as np

from guda_fast.diffusion.schedule import FloatArray


def exceedance(x: FloatArray, nu: float) -> FloatArray:
    """P(T > x) under nu degrees of freedom [(N,), 0..1]."""
    from scipy.special import stdtr  # heavy

    return np.asarray(stdtr(nu, -x), dtype=np.float64)


def quantile(level: float, nu: FloatArray | float) -> FloatArray:
    """The x that T stays below with probability ``level``, for each number of degrees of freedom."""
    from scipy.special import stdtrit  # heavy

    return np.asarray(stdtrit(nu, level), dtype=np.float64)


def error_bound(wrong: int, asked: int, level: float) -> float:
    """Upper Clopper-Pearson bound of an error rate [0..1].

    >>> error_bound(0, 299, 0.95) < 0.01 < error_bound(0, 298, 0.95)
    True
    """
    if wrong == asked:
        return 1.0
    from scipy.special import betaincinv  # heavy

    return float(betaincinv(wrong + 1, asked - wrong, level))
