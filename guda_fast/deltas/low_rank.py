"""Finding out that a dense difference is a product of thin factors."""

from __future__ import annotations

import torch

from guda_fast.deltas.delta import LowRank

TOLERANCE = 1e-4
"""What ||delta - up down|| may be at most, relative to ||delta||; the cosine then differs from 1 by 5e-9."""
MAX_RANK = 128
_OVERSAMPLING = 8
_FIRST_SKETCH = 16


def factored(delta: torch.Tensor, tolerance: float = TOLERANCE) -> LowRank | None:
    """A dense difference as factors, where they take at most half of its memory.

    ||delta - up down||_F <= tolerance * ||delta||_F. A difference in few rows or few columns is factored exactly. Of
    others the range is sampled with random vectors, ever more until the tolerance is met, and an SVD within it gives
    the smallest rank that meets it. Equal inputs give equal factors: the vectors come from a fixed seed.

    delta: a difference of a weight (O, *I) [float32 or float64, on the CPU, finite]
    tolerance: [0 <= tolerance < 1]; 0 accepts exact factors only
    Returns: up (O, r) and down (r, *I) in delta's dtype, with up down closest to delta for its rank [r <= 128]; None
        where there are none
    Source: Halko, Martinsson, Tropp 2011, algorithms 4.1 and 5.1

    >>> factored(torch.ones(8, 8)).rank
    1
    >>> factored(torch.eye(8)) is None
    True
    """
    if delta.dim() < 2 or delta.numel() == 0:
        return None
    matrix = delta.reshape(len(delta), -1)
    rows, columns = matrix.shape
    limit = min(MAX_RANK, rows * columns // (2 * (rows + columns)))
    if limit < 1:
        return None
    found = _sparse(matrix, limit) or (_sampled(matrix, limit, tolerance) if tolerance > 0 else None)
    if found is None:
        return None
    up, down = found
    return LowRank(up.contiguous(), down.reshape(-1, *delta.shape[1:]).contiguous())


def _sparse(matrix: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Exact factors of a matrix that is zero but in few rows, or few columns."""
    rows = matrix.any(1).nonzero().flatten()
    if 0 < len(rows) <= limit:
        return _selection(len(matrix), rows, matrix.dtype), matrix[rows]
    columns = matrix.any(0).nonzero().flatten()
    if 0 < len(columns) <= limit:
        return matrix[:, columns], _selection(matrix.shape[1], columns, matrix.dtype).T
    return None


def _selection(length: int, chosen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Columns of the identity: products with it are exact."""
    selection = torch.zeros(length, len(chosen), dtype=dtype, device="cpu")
    selection[chosen, torch.arange(len(chosen), device="cpu")] = 1
    return selection


def _sampled(matrix: torch.Tensor, limit: int, tolerance: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Factors of a matrix whose range random combinations of its columns span, to the tolerance."""
    norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    if norm == 0:
        return None
    # Sums of squares of small numbers underflow; singular vectors do not depend on the scale.
    scaled = matrix / matrix.abs().max()
    size = min(_FIRST_SKETCH, limit)
    while True:
        range_ = _range(scaled, min(size + _OVERSAMPLING, *matrix.shape))
        within = range_.T @ scaled
        if _distance(scaled, range_, within) <= tolerance:
            return _truncated(matrix, range_, within, limit, tolerance)
        if size == limit:
            return None
        size = min(2 * size, limit)


def _range(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """An orthonormal basis of what the matrix makes of ``size`` random vectors."""
    random = torch.Generator(device="cpu").manual_seed(0)
    vectors = torch.randn(matrix.shape[1], size, generator=random, dtype=matrix.dtype, device="cpu")
    basis: torch.Tensor = torch.linalg.qr(matrix @ vectors).Q
    return basis


def _truncated(
    matrix: torch.Tensor, range_: torch.Tensor, within: torch.Tensor, limit: int, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The factors of the smallest rank whose product, as it will be formed, is close enough."""
    left, singular, _ = torch.linalg.svd(within, full_matrices=False)
    tails = singular.double().square().flip(0).cumsum(0).flip(0).sqrt()
    rank = max(1, int((tails > tolerance * tails[0]).sum()))
    for tried in range(rank, min(rank + 2, limit, len(singular)) + 1):
        up = range_ @ left[:, :tried]
        down = up.T @ matrix
        if _distance(matrix, up, down) <= tolerance:
            return up, down
    return None


def _distance(matrix: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
    """||matrix - up down|| / ||matrix||."""
    rest = torch.linalg.vector_norm(matrix - up @ down, dtype=torch.float64)
    return float(rest / torch.linalg.vector_norm(matrix, dtype=torch.float64))
