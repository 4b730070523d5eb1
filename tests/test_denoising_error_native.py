"""The extension's own `denoising_error`: its definition, equal bits everywhere, and argument checks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from guda_fast import _C
from native_calls import Rows, denoising_error, denoising_error_arguments, instruction_set
from native_rows import HOST_REFUSALS, SETS, SIZES, noised_tolerance, plain_noised, refusal_rows, views_of


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_definition(name: str, elements: int, dtype: torch.dtype) -> None:
    x0, rows = torch.randn(2, elements), Rows(3, 2)
    predictions = torch.randn(3, 3, elements).to(dtype)
    with instruction_set(name):
        errors, paired = denoising_error(predictions, x0, rows, paired=True)
    assert paired is not None
    target = plain_noised(x0, rows)
    expected = rows.weight * (predictions.double() - target).square().sum(-1)
    change = predictions.double() - predictions[:1].double()
    together = predictions.double() + predictions[:1].double() - 2 * target
    expected_paired = rows.weight * (change * together).sum(-1)
    # A float32 difference is off by the target's error and one rounding of a value below 16.
    off = noised_tolerance(x0) + 2.0**-24 * 16
    slack = rows.weight * (2 * off * (predictions.double() - target).abs() + off**2).sum(-1)
    assert ((errors - expected).abs() <= slack + 1e-14 * expected).all()
    rounding = 2.0**-24 * change.abs() * together.abs()
    slack = rows.weight * (2 * off * change.abs() + rounding).sum(-1)
    assert ((paired - expected_paired).abs() <= slack + 1e-12).all()
    assert (paired[0] == 0).all()


@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_bits_for_every_set_and_thread_count(elements: int, dtype: torch.dtype) -> None:
    x0, rows = torch.randn(3, elements), Rows(19, 3)
    predictions = torch.randn(2, 19, elements).to(dtype)
    results = []
    for name, threads in itertools.product(SETS, (1, 2, 3)):
        with instruction_set(name):
            results.append(denoising_error(predictions, x0, rows, paired=True, threads=threads))
    for errors, paired in results:
        assert torch.equal(errors, results[0][0])
        assert paired is not None
        assert results[0][1] is not None
        assert torch.equal(paired, results[0][1])


@pytest.mark.parametrize("name", SETS)
def test_paired_and_plain_errors_are_equal_bits(name: str) -> None:
    x0, rows, predictions = torch.randn(2, 4099), Rows(3, 2), torch.randn(3, 3, 4099)
    with instruction_set(name):
        assert torch.equal(
            denoising_error(predictions, x0, rows, paired=True)[0],
            denoising_error(predictions, x0, rows)[0],
        )


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (6, 65), (3, 7, 5), (2, 3, 33, 31)])
def test_strides(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x0, rows = torch.randn(4, *shape), Rows(5, 4)
    predictions = torch.randn(2, 5, *shape).to(dtype)
    with instruction_set(name):
        expected = denoising_error(predictions, x0, rows, paired=True)
        flat = predictions.reshape(10, *shape)
        for view in views_of(flat.float()):
            strided = view.to(dtype).unflatten(0, (2, 5))
            assert_same(denoising_error(strided, x0, rows, paired=True), expected)
        wide = torch.full((2, 5, 2 * shape[0], *shape[1:]), torch.nan, dtype=dtype)[:, :, : shape[0]]
        assert_same(denoising_error(wide.copy_(predictions), x0, rows, paired=True), expected)
        models_inside = predictions.transpose(0, 1).contiguous().transpose(0, 1)
        assert_same(denoising_error(models_inside, x0, rows, paired=True), expected)


def test_expanded_predictions() -> None:
    x0, rows, one = torch.randn(2, 4, 8, 8), Rows(3, 2), torch.randn(1, 1, 4, 1, 8)
    expanded = one.expand(2, 3, 4, 8, 8)
    assert_same(
        denoising_error(expanded, x0, rows, paired=True),
        denoising_error(expanded.contiguous(), x0, rows, paired=True),
    )


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_converted_exactly(name: str, dtype: torch.dtype) -> None:
    """One element a row against a target of zero: the error is the value's square."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    predictions = bits.view(dtype).reshape(1, -1, 1)
    rows = Rows(2**16, 1)
    rows.x0_scale.zero_()
    rows.eps_scale.zero_()
    rows.weight.fill_(1.0)
    with instruction_set(name):
        errors, _ = denoising_error(predictions, torch.zeros(1, 1), rows)
    expected = predictions.double().square().squeeze(-1)
    assert torch.equal(errors.isnan(), expected.isnan())
    assert torch.equal(errors.nan_to_num(-1.0), expected.nan_to_num(-1.0))


@pytest.mark.parametrize("name", SETS)
def test_subnormal_float16_survives_flush_denormal(name: str) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        rows = Rows(1, 1)
        rows.x0_scale.zero_()
        rows.eps_scale.zero_()
        rows.weight.fill_(1.0)
        tiny = torch.tensor([1], dtype=torch.int16).view(torch.float16).reshape(1, 1, 1)
        with instruction_set(name):
            errors, _ = denoising_error(tiny, torch.zeros(1, 1), rows)
    finally:
        torch.set_flush_denormal(False)
    assert float(errors) == 2.0**-48


def test_small_differences_survive() -> None:
    """A change of one part in 2**20 of the predictions: four digits of it are right."""
    x0, rows, base = torch.randn(1, 3072), Rows(2, 1), torch.randn(2, 3072)
    predictions = torch.stack([base, base * (1 + 2.0**-20)])
    _, paired = denoising_error(predictions, x0, rows, paired=True)
    assert paired is not None
    change = predictions[1].double() - predictions[0].double()
    together = predictions.double().sum(0) - 2 * plain_noised(x0, rows)
    expected = rows.weight * (change * together).sum(-1)
    # The sum is linear in the change, so a wrong target costs its error times the change and no more.
    off = noised_tolerance(x0) + 2.0**-24 * 16
    assert ((paired[1] - expected).abs() <= rows.weight * 2 * off * change.abs().sum(-1)).all()
    assert (rows.weight * 2 * off * change.abs().sum(-1) < 1e-4 * expected.abs()).all()


@pytest.mark.parametrize(("models", "rows", "shape"), [(0, 3, (4,)), (2, 0, (4,)), (2, 3, (0, 4))])
def test_empty(models: int, rows: int, shape: tuple[int, ...]) -> None:
    errors, paired = denoising_error(
        torch.zeros(models, rows, *shape), torch.zeros(2, *shape), Rows(rows, 2), paired=True
    )
    assert paired is not None
    assert torch.equal(errors, torch.zeros(models, rows, dtype=torch.float64))
    assert torch.equal(paired, torch.zeros(models, rows, dtype=torch.float64))


def assert_same(
    result: tuple[torch.Tensor, torch.Tensor | None], expected: tuple[torch.Tensor, torch.Tensor | None]
) -> None:
    assert torch.equal(result[0], expected[0])
    assert result[1] is not None
    assert expected[1] is not None
    assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize(("change", "error", "message"), HOST_REFUSALS)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    rows, x0, predictions = refusal_rows(), torch.zeros(2, 3, 4), torch.zeros(1, 2, 3, 4)
    errors = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(error, match=f"denoising_error: {message}"):
        _C.denoising_error(**{**denoising_error_arguments(errors, None, predictions, x0, rows), **change})
    assert (errors == 0).all()
