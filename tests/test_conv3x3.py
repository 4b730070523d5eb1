"""`conv3x3` on every backend: against its float64 definition and eager, layouts, invariances, errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conv3x3_cases import assert_within_twice_eager, make
from guda_fast import _backends, ops, reference

SHAPES = [
    (4, 32, 32, 8, 8),
    (1, 16, 32, 16, 16),
    (3, 48, 64, 7, 13),
    (64, 32, 96, 2, 2),
    (90, 16, 32, 1, 1),
    (2, 128, 32, 12, 12),
]


@pytest.fixture(params=["cpp", "torch", "reference"])
def backend(request: pytest.FixtureRequest) -> Any:
    with _backends.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_error(shape: tuple[int, ...], biased: bool, backend: str) -> None:
    x, weight, bias = make(*shape)
    assert_within_twice_eager(x, weight, bias if biased else None)


def test_the_definition_is_pytorchs() -> None:
    x, weight, bias = make(2, 5, 7, 6, 9, torch.float64)
    exact = F.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(reference.conv3x3(x, weight, bias), exact, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ops.conv3x3(x, weight, bias), exact, rtol=1e-13, atol=1e-13)
    assert reference.conv3x3(x.float(), weight.float(), dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("last", [False, True])
def test_the_result_has_the_layout_and_dtype_of_x(last: bool, dtype: torch.dtype) -> None:
    x, weight, bias = make(4, 16, 32, 8, 8, dtype)
    layout = torch.channels_last if last else torch.contiguous_format
    for name in ("auto", "torch", "reference"):
        out = ops.conv3x3(x.contiguous(memory_format=layout), weight, bias, backend=name)
        assert out.dtype == dtype and out.is_contiguous(memory_format=layout)


def test_a_row_does_not_depend_on_the_others() -> None:
    """To the bit: tiles are computed alike wherever they lie in a block, which may begin inside of a row."""
    x, weight, bias = make(9, 32, 32, 16, 18)
    expected = ops.conv3x3(x, weight, bias, backend="cpp")
    for rows in (slice(0, 1), slice(3, 8), slice(8, 9)):
        assert torch.equal(ops.conv3x3(x[rows], weight, bias, backend="cpp"), expected[rows])


def test_threads_change_no_bit() -> None:
    x, weight, bias = make(5, 32, 64, 14, 10)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.conv3x3(x, weight, bias, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_any_memory_of_the_arguments() -> None:
    x, weight, bias = make(4, 32, 32, 8, 8)
    expected = ops.conv3x3(x, weight, bias, backend="cpp")
    inside = torch.cat([x, x])[4:]  # of larger memory
    assert torch.equal(
        ops.conv3x3(inside, weight.contiguous(), bias.repeat_interleave(2)[::2], backend="cpp"), expected
    )
    torch.testing.assert_close(ops.conv3x3(x.contiguous(), weight, bias), expected)
    negated = torch.imag(torch.complex(x, -x).conj())
    torch.testing.assert_close(ops.conv3x3(negated, weight, bias), expected)


def test_nothing_to_compute(backend: str) -> None:
    if backend != "cpp":  # which leaves so little to others
        for shape in ((0, 16, 32, 4, 4), (2, 16, 0, 4, 4), (2, 16, 32, 0, 4)):
            x, weight, bias = make(*shape)
            assert ops.conv3x3(x, weight, bias).shape == (shape[0], shape[2], *shape[3:])
        x, weight, bias = torch.ones(2, 0, 4, 4), torch.ones(32, 0, 3, 3), torch.ones(32)
        assert torch.equal(ops.conv3x3(x, weight, bias), torch.ones(2, 32, 4, 4))


def test_what_is_not_finite_stays_in_its_row(backend: str) -> None:
    x, weight, bias = make(16, 32, 32, 8, 8)
    clean = ops.conv3x3(x, weight, bias)
    x[3, 5, 4, 4] = torch.inf
    found = ops.conv3x3(x, weight, bias)
    others = [row for row in range(16) if row != 3]
    assert torch.equal(found[others], clean[others])
    assert not found[3, :, 3:6, 3:6].isfinite().any()


def test_no_gradient() -> None:
    x, weight, bias = make(4, 32, 32, 8, 8)
    assert not ops.conv3x3(x.requires_grad_(), weight.requires_grad_(), bias).requires_grad


def _tiles(rows: int, inputs: int = 32, outputs: int = 32) -> tuple[Tensor, Tensor]:
    return make(rows, inputs, outputs, 8, 8)[:2]


REASONS = [
    ((_tiles(3)), "48 tiles of 2x2 are too few"),
    ((_tiles(7, inputs=512, outputs=512)), "112 tiles of 2x2 are too few .* pays from 128 on"),
    ((_tiles(4, inputs=24)), "channels are 24 to 32"),
    ((_tiles(4, outputs=48)), "channels are 32 to 48"),
    (tuple(tensor.double() for tensor in _tiles(4)), "x is float64"),
    (tuple(tensor.bfloat16() for tensor in _tiles(4)), "x is bfloat16"),
    ((_tiles(4)[0].contiguous(), _tiles(4)[1]), "x is not in channels-last"),
]


@pytest.mark.parametrize(("inputs", "reason"), REASONS)
def test_explains_why_cpp_does_not_run(inputs: tuple[Tensor, ...], reason: str) -> None:
    with pytest.raises(_backends.BackendUnavailableError, match=reason):
        ops.conv3x3(*inputs, backend="cpp")
    assert re.search(reason, _backends.explain("conv3x3", *inputs))
    assert_within_twice_eager(*inputs)


REFUSALS = [
    ({"x": 0}, TypeError, "x must be a torch.Tensor, got 0"),
    ({"x": torch.zeros(2, 16, 4)}, ValueError, r"x must have shape \(\*, \*, \*, \*\)"),
    ({"x": torch.zeros(2, 16, 4, 4).int()}, TypeError, "x must be float32 or bfloat16 or float16 or float64"),
    ({"weight": torch.zeros(32, 8, 3, 3)}, ValueError, r"weight must have shape \(\*, 16, 3, 3\)"),
    ({"weight": torch.zeros(32, 16, 1, 1)}, ValueError, r"weight must have shape \(\*, 16, 3, 3\)"),
    ({"weight": torch.zeros(32, 16, 3, 3).double()}, TypeError, "weight must be float32"),
    ({"bias": torch.zeros(31)}, ValueError, r"bias must have shape \(32,\)"),
    ({"bias": torch.zeros(32).half()}, TypeError, "bias must be float32"),
    ({"backend": "cuddn"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    valid = {"x": torch.zeros(2, 16, 4, 4), "weight": torch.zeros(32, 16, 3, 3), "bias": torch.zeros(32)}
    with pytest.raises(error, match=f"conv3x3: {message}"):
        ops.conv3x3(**{**valid, **change})
