"""What an estimator returns: scores of (query, group) cells with standard errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from guda_fast.diffusion import Protocol
from guda_fast.diffusion.schedule import FloatArray


@dataclass(frozen=True, eq=False)
class Cells:
    """scores, std_error: [(N, K), float64; NaN where unknown]. std_error_kind: "samples", "antithetic pairs",
    "collapsed pairs (approximate)" or "none". base_errors: weighted errors of the base [(N, D), float64]."""

    scores: FloatArray
    std_error: FloatArray
    std_error_kind: str
    base_errors: FloatArray


def std_error_kind(protocol: Protocol) -> str:
    """How ``standard_error`` estimates the noise of this protocol's scores."""
    if protocol.antithetic and protocol.samples >= 4:
        return "antithetic pairs"
    if protocol.samples >= 2 and not protocol.antithetic:
        return "samples"
    return "collapsed pairs (approximate)" if len(protocol.timesteps) >= 2 else "none"


def standard_error(differences: FloatArray, protocol: Protocol) -> FloatArray:
    """Monte Carlo standard error of scores that are sums of weighted differences over the draws.

    With S >= 2 samples, the sum over timesteps of S times the sample variance (of pair sums when antithetic, which
    takes two pairs). With one sample, neighbouring timesteps stand in for two samples of one timestep: the sum
    over collapsed pairs of (d_1 - d_2)^2, which also holds their difference in mean; an odd last timestep joins the
    last pair.

    differences: w_t (e_k - e_0) / S in the order of the protocol's draws [(N, D), float64].

    Returns [(N,), float64; NaN for a single draw]. Source: Wolter 2007, section 2.5 (collapsed strata).
    """
    kind = std_error_kind(protocol)
    terms = differences.reshape(len(differences), len(protocol.timesteps), protocol.samples)
    if protocol.antithetic:
        terms = terms[..., 0::2] + terms[..., 1::2]
    if kind in ("samples", "antithetic pairs"):
        variance = terms.shape[2] * terms.var(axis=2, ddof=1).sum(axis=1)
    elif kind == "none":
        return np.full(len(differences), np.nan)
    else:
        variance = _collapsed_variance(terms[..., 0])
    return np.asarray(np.sqrt(variance))


def _collapsed_variance(terms: FloatArray) -> FloatArray:
    count = terms.shape[1]
    paired = count - 3 if count % 2 else count
    pairs = terms[:, :paired].reshape(len(terms), -1, 2)
    variance: FloatArray = np.square(pairs[..., 0] - pairs[..., 1]).sum(axis=1)
    if count % 2:
        variance = variance + 3 * terms[:, -3:].var(axis=1, ddof=1)
    return variance
