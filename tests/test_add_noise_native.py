"""The extension's own `add_noise`: its definition, equal bits everywhere, and argument checks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from guda_fast import _C
from native_calls import Rows, add_noise, add_noise_arguments, instruction_set
from native_rows import (
    HOST_REFUSALS,
    SETS,
    SIZES,
    noised_tolerance,
    plain_noised,
    refusal_rows,
    unit_noise_rows,
    views_of,
)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize("antithetic", [False, True])
def test_definition(name: str, elements: int, antithetic: bool) -> None:
    x0, rows = torch.randn(3, elements), Rows(4, 3)
    with instruction_set(name):
        noised = add_noise(x0, rows, antithetic=antithetic)
    expected = plain_noised(x0, rows, antithetic=antithetic)
    assert float((noised.double() - expected).abs().max()) <= noised_tolerance(x0)


@pytest.mark.parametrize("elements", SIZES)
def test_equal_bits_for_every_set_and_thread_count(elements: int) -> None:
    x0, rows = torch.randn(3, elements), Rows(37, 3)
    results = []
    for name, threads in itertools.product(SETS, (1, 2, 3)):
        with instruction_set(name):
            results.append(add_noise(x0, rows, threads=threads))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("shape", [(7,), (3, 65), (3, 7, 5), (2, 3, 33, 31), (1, 1, 1, 1), (2, 1, 129, 2)])
def test_strides(name: str, shape: tuple[int, ...]) -> None:
    """Permuted, sliced, stepped and expanded inputs and outputs give the contiguous call's bits."""
    rows = Rows(5, 4)
    x0 = torch.randn(4, *shape)
    with instruction_set(name):
        expected = add_noise(x0, rows)
        for x0_view in views_of(x0):
            for out in views_of(torch.empty_like(expected)):
                assert torch.equal(add_noise(x0_view, rows, out=out), expected)
        shared = x0[:1].expand(4, *shape)
        assert torch.equal(add_noise(shared, rows), add_noise(shared.contiguous(), rows))


def test_strided_output_leaves_the_rest_alone() -> None:
    storage = torch.zeros(6, 10, 10)
    add_noise(torch.randn(2, 5, 3), Rows(3, 2), out=storage[::2, ::2, 1:4])
    written = storage != 0
    assert written[::2, ::2, 1:4].all()
    assert int(written.sum()) == 3 * 5 * 3


def test_rows_stand_alone() -> None:
    """A row's result does not depend on the other rows of the call."""
    x0, rows = torch.randn(3, 4, 9, 9), Rows(6, 3)
    together = add_noise(x0, rows)
    for row in range(6):
        alone = Rows(1, 3)
        for field in ("query_index", "query_id", "timestep", "sample", "x0_scale", "eps_scale"):
            setattr(alone, field, getattr(rows, field)[row : row + 1])
        assert torch.equal(add_noise(x0, alone)[0], together[row])


@pytest.mark.parametrize("name", SETS)
def test_antithetic_pairs_cancel(name: str) -> None:
    rows = Rows(2, 1)
    rows.x0_scale.zero_()
    rows.eps_scale.fill_(0.7)
    rows.query_id.fill_(9)
    rows.timestep.fill_(11)
    rows.sample[:] = torch.tensor([6, 7])
    with instruction_set(name):
        pair = add_noise(torch.zeros(1, 1001), rows, antithetic=True)
        plain = add_noise(torch.zeros(1, 1001), rows)
    assert torch.equal(pair[0], -pair[1])
    assert torch.equal(pair[0], plain[0])
    assert not torch.equal(plain[0], -plain[1])


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_scale_of_zero_ignores_x0(name: str, bad: float) -> None:
    rows = Rows(2, 1)
    rows.x0_scale[:] = torch.tensor([0.0, 0.5])
    with instruction_set(name):
        noised = add_noise(torch.full((1, 77), bad), rows)
    assert noised[0].isfinite().all()
    assert not noised[1].isfinite().any()


@pytest.mark.parametrize(("rows", "shape"), [(0, (3, 4)), (5, (3, 0)), (5, (0, 3, 2)), (0, (0,))])
def test_empty(rows: int, shape: tuple[int, ...]) -> None:
    assert add_noise(torch.zeros(2, *shape), Rows(rows, 2)).shape == (rows, *shape)


def test_no_rows_needs_no_queries() -> None:
    assert add_noise(torch.zeros(0, 8), Rows(0, 0)).shape == (0, 8)


def test_seed_of_64_bits() -> None:
    rows = unit_noise_rows()
    results = [add_noise(torch.zeros(1, 8), rows, seed=seed) for seed in (0, 2**32, 2**63, 2**64 - 1)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(results, 2))


@pytest.mark.parametrize(("change", "error", "message"), HOST_REFUSALS)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    rows, x0, out = refusal_rows(), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    with pytest.raises(error, match=f"add_noise: {message}"):
        _C.add_noise(**{**add_noise_arguments(out, x0, rows), **change})
    assert (out == 0).all()


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("query_index", -1, IndexError),
        ("query_index", 2, IndexError),
        ("timestep", -1, ValueError),
        ("timestep", 65536, ValueError),
        ("sample", -1, ValueError),
        ("sample", 2**40, ValueError),
    ],
)
def test_rows_are_named(field: str, value: int, error: type[Exception]) -> None:
    rows, out = refusal_rows(), torch.zeros(2, 5)
    getattr(rows, field)[1] = value
    with pytest.raises(error, match=f"add_noise: {field} must be .*, got {value} in row 1"):
        _C.add_noise(**add_noise_arguments(out, torch.zeros(2, 5), rows))
