"""Which draws come first, and what the first ones say about the sum of all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from guda_fast.diffusion.schedule import FloatArray
from guda_fast.estimators.scatter import NU

_FIRST_LOOKS = (*range(1, 7), 8, 10, 12, 15, 18, 22, 27, 33, 40, 48, 58, 70, 84)
_GROWTH = 1.2


@dataclass(frozen=True, eq=False)
class Design:
    """An order of the draws, and the scatter of the differences along it.

    order: draws, the first to be evaluated first [(D,), int64, a permutation].
    factor: lower Cholesky factor L of Sigma in this order [(D, D), float64].
    nu: degrees of freedom of the t distribution [> 0].

    White differences z = L^-1 d make everything a running sum: with c_j the sum of column j of L, the best linear
    estimate of the sum of d after n draws is c_1 z_1 + ... + c_n z_n, its scale v_n = c_{n+1}^2 + ... + c_D^2, and
    d_E' Sigma_EE^-1 d_E = z_1^2 + ... + z_n^2.
    """

    order: NDArray[np.int64]
    factor: FloatArray
    nu: float = NU

    @classmethod
    def greedy(cls, sigma: FloatArray, nu: float = NU) -> Design:
        """The order in which each draw takes most from the variance of what is not known of the sum.

        sigma: scatter of the differences [(D, D), positive definite].
        """
        draws = len(sigma)
        rest = sigma.copy()
        open_ = np.ones(draws, dtype=bool)
        order = np.empty(draws, dtype=np.int64)
        for n in range(draws):
            spread = np.diag(rest)
            gain = np.full(draws, -np.inf)
            gain[open_] = np.square(rest[open_][:, open_].sum(axis=1)) / spread[open_]
            pick = int(gain.argmax())
            order[n], open_[pick] = pick, False
            rest = rest - np.outer(rest[:, pick], rest[pick]) / spread[pick]
        return cls.along(order, sigma, nu)

    @classmethod
    def along(cls, order: NDArray[np.int64], sigma: FloatArray, nu: float = NU) -> Design:
        """A given order with the scatter of other differences."""
        factor = np.asarray(np.linalg.cholesky(sigma[np.ix_(order, order)]), dtype=np.float64)
        return cls(order, factor, nu)

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def gain(self) -> FloatArray:
        """c: what a unit of each white difference adds to the estimate of the sum [(D,)]."""
        total: FloatArray = self.factor.sum(axis=0)
        return total

    @cached_property
    def variance(self) -> FloatArray:
        """v_n, the scale of what is unknown of the sum after n draws; v_D = 0 [(D + 1,)]."""
        tail: FloatArray = np.append(np.cumsum(np.square(self.gain)[::-1])[::-1], 0.0)
        return tail

    def whiten(self, differences: FloatArray, white: FloatArray) -> FloatArray:
        """White differences of more draws.

        differences: of the first n draws in the design's order [(C, n)]. white: those known already [(C, m), m <= n].
        """
        known, n = white.shape[1], differences.shape[1]
        block = differences[:, known:] - white @ self.factor[known:n, :known].T
        fresh = solve_triangular(self.factor[known:n, known:n], block.T, lower=True, check_finite=False).T
        return np.concatenate([white, fresh], axis=1)

    def scale(self, squares: FloatArray, n: int) -> FloatArray:
        """Scale of the t distribution, with nu + n degrees of freedom, of the sum after n draws.

            scale^2 = v_n (nu + z_1^2 + ... + z_n^2) / (nu + n)

        squares: z_1^2 + ... + z_n^2 [(C,)].
        """
        found: FloatArray = np.sqrt(self.variance[n] * (self.nu + squares) / (self.nu + n))
        return found


def looks(draws: int, least: int = 1) -> tuple[int, ...]:
    """After how many draws the race is looked at: all small numbers, then a fifth more each time, at last all.

    >>> looks(20, least=2)
    (2, 3, 4, 5, 6, 8, 10, 12, 15, 18, 20)
    """
    found = list(_FIRST_LOOKS)
    while found[-1] < draws:
        found.append(int(np.ceil(found[-1] * _GROWTH)))
    least = min(least, draws)
    return tuple(sorted({least, draws} | {n for n in found if least < n < draws}))
