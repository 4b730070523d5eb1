"""Factors of dense differences: found where there are some, to the tolerance, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from guda_fast.deltas.low_rank import MAX_RANK, TOLERANCE, factored


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def product(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A matrix of a rank whose singular values are all of one size."""
    return (random(shape[0], rank, dtype=dtype) @ random(rank, *shape[1:], seed=1, dtype=dtype).flatten(1)).view(shape)


def distance(delta: torch.Tensor, found: object) -> float:
    full = found.full(delta.shape)  # type: ignore[attr-defined]
    return float((full - delta).double().norm() / delta.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rank", "shape"), [(1, (8, 8)), (4, (64, 32, 3, 3)), (16, (64, 64)), (40, (320, 300)), (3, (7, 91)), (2, (90, 5))]
)
@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_products_are_found_with_their_rank(
    rank: int, shape: tuple[int, ...], scale: float, dtype: torch.dtype
) -> None:
    delta = scale * product(rank, *shape, dtype=dtype)
    found = factored(delta)
    assert found is not None and found.rank == rank and found.dtype == dtype
    assert found.up.shape == (shape[0], rank) and found.down.shape == (rank, *shape[1:])
    # Sums of at most max(shape) products, and factors that are rounded: far below the tolerance.
    assert distance(delta, found) < 32 * max(shape) ** 0.5 * torch.finfo(dtype).eps


def test_a_merged_checkpoint_has_the_rank_of_what_was_merged() -> None:
    """theta_k was rounded, which leaves 2^-24 of theta: 6e-6 of a delta of one hundredth of it."""
    theta = 0.02 * random(128, 128, 3, 3, seed=2)
    change = product(4, 128, 128, 3, 3)
    change *= 0.01 * theta.norm() / change.norm()
    found = factored((theta + change) - theta)
    assert found is not None and found.rank == 4
    assert distance(change, found) < 2**-24 / 0.01


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
def test_the_rank_is_the_least_that_meets_the_tolerance(tolerance: float) -> None:
    left, right = (torch.linalg.qr(random(100, 100, seed=seed)).Q for seed in (3, 4))
    singular = 0.3 ** torch.arange(100.0)
    delta = left @ torch.diag(singular) @ right
    tails = singular.double().square().flip(0).cumsum(0).flip(0).sqrt() / singular.double().norm()
    found = factored(delta, tolerance)
    assert found is not None and found.rank == int((tails > tolerance).sum())
    assert distance(delta, found) <= tolerance


def test_full_ranks_and_ranks_that_save_less_than_half_stay_dense() -> None:
    assert factored(random(64, 64)) is None
    assert factored(product(17, 64, 64)) is None
    assert factored(torch.eye(64)) is None
    # Noise of three tolerances is not what the factors may miss.
    noisy = product(2, 64, 64)
    noise = random(64, 64, seed=5)
    assert factored(noisy + 3 * TOLERANCE * noise * noisy.norm() / noise.norm()) is None


def test_ranks_end_where_searching_would_take_long() -> None:
    assert factored(product(MAX_RANK + 1, 600, 600)) is None
    found = factored(product(MAX_RANK, 600, 600))
    assert found is not None and found.rank == MAX_RANK


@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
@pytest.mark.parametrize("dim", [0, 1])
def test_few_rows_or_columns_are_factored_exactly(dim: int, tolerance: float) -> None:
    delta = torch.zeros(40, 10, 2, 2)
    if dim == 0:
        delta[[3, 17]] = random(2, 10, 2, 2)
    else:
        delta[:, 4, 1, 0] = random(40)
        delta[:, 7, 0, 0] = random(40, seed=1)
    found = factored(delta, tolerance)
    assert found is not None and found.rank == 2
    assert torch.equal(found.full(delta.shape), delta)


def test_no_tolerance_takes_exact_factors_only() -> None:
    assert factored(product(2, 64, 64), 0.0) is None


@pytest.mark.parametrize("shape", [(), (0,), (7,), (0, 4), (1, 1), (2, 3)])
def test_what_cannot_be_smaller(shape: tuple[int, ...]) -> None:
    assert factored(torch.ones(shape)) is None


def test_zeros_have_no_factors() -> None:
    assert factored(torch.zeros(32, 32)) is None


def test_equal_inputs_give_equal_factors_and_leave_the_random_state() -> None:
    delta, state = product(4, 64, 64), torch.get_rng_state()
    one, two = factored(delta), factored(delta.clone())
    assert one is not None and two is not None
    assert torch.equal(one.up, two.up) and torch.equal(one.down, two.down)
    assert torch.equal(torch.get_rng_state(), state)


def test_channels_last_differences() -> None:
    delta = product(3, 32, 32, 3, 3)
    found = factored(delta.to(memory_format=torch.channels_last))
    assert found is not None and found.rank == 3 and found.down.is_contiguous()
    assert distance(delta, found) < 1e-5
