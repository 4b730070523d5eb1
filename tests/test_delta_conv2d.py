"""`delta_conv2d` on every backend: against float64 row by row, windows, layouts, errors, torch.compile."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from delta_cases import BACKENDS, FORMS, INDEX, OFFSETS, Layer, here, random_layer
from guda_fast import ops

WINDOWS: list[dict[str, Any]] = [
    {},
    {"padding": 1},
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (2, 0), "dilation": (1, 2)},
]


def conv_layer(
    form: str,
    window: dict[str, Any],
    x: tuple[int, ...] = (9, 3, 6, 5),
    weight: tuple[int, ...] = (5, 3, 3, 2),
    **options: Any,
) -> Layer:
    return random_layer(x, weight, form, partial(F.conv2d, **window), **options)


def run(layer: Layer, offsets: Tensor | None, backend: str = "auto", **window: Any) -> Tensor:
    return ops.delta_conv2d(
        layer.x, layer.weight, layer.bias,
        offsets=here(offsets), delta_index=here(INDEX), backend=backend, **window, **layer.deltas,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offsets", [OFFSETS, None], ids=["segments", "shared"])
def test_agrees_with_float64(backend: str, form: str, dtype: torch.dtype, offsets: Tensor | None) -> None:
    layer = conv_layer(form, {"padding": 1}, (9, 3, 3, 2), dtype=dtype)
    layer.check(run(layer, offsets, backend, padding=1), offsets, INDEX)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "rank 3"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows_and_layouts(backend: str, form: str, window: dict[str, Any]) -> None:
    layer = conv_layer(form, window, bias=False)
    for offsets in (OFFSETS, None):
        result = run(layer, offsets, backend, **window)
        assert result.is_contiguous()
        layer.check(result, offsets, INDEX)
        last = Layer(layer.x.to(memory_format=torch.channels_last), *list(vars(layer).values())[1:])
        result = run(last, offsets, backend, **window)
        assert (result if offsets is not None else result[0]).is_contiguous(memory_format=torch.channels_last)
        layer.check(result, offsets, INDEX)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "rank 3"])
@pytest.mark.parametrize(
    ("x", "weight"), [((9, 1, 1, 1), (1, 1, 1, 1)), ((9, 18, 2, 3), (20, 18, 1, 1)), ((9, 2, 4, 9), (3, 2, 4, 1))]
)
def test_sizes(backend: str, form: str, x: tuple[int, ...], weight: tuple[int, ...]) -> None:
    layer = conv_layer(form, {}, x, weight)
    for offsets in (OFFSETS, None):
        layer.check(run(layer, offsets, backend), offsets, INDEX)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "rank 3"])
def test_strides_of_weights_change_nothing(backend: str, form: str) -> None:
    layer = conv_layer(form, {})
    turned = layer.map(
        lambda tensor: tensor.movedim(-3, -1).contiguous().movedim(-1, -3) if tensor.dim() > 3 else tensor
    )
    channels_last = layer.map(
        lambda tensor: tensor if tensor.dim() < 4 else tensor.movedim(-3, -1).contiguous().movedim(-1, -3)
    )
    for other in (turned, channels_last):
        layer.check(run(other, OFFSETS, backend), OFFSETS, INDEX)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str) -> None:
    layer = conv_layer("dense", {}, (0, 3, 6, 5))
    none = torch.zeros(7).long()
    assert run(layer, none, backend).shape == (0, 5, 4, 4)
    assert run(layer, None, backend).shape == (6, 0, 5, 4, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "rank 3", "bias"])
@pytest.mark.parametrize("offsets", [OFFSETS, None], ids=["segments", "shared"])
def test_no_delta_at_all(backend: str, form: str, offsets: Tensor | None) -> None:
    layer, index = conv_layer(form, {}, number=0), torch.full((6,), -1)
    result = ops.delta_conv2d(
        layer.x, layer.weight, layer.bias,
        offsets=here(offsets), delta_index=here(index), backend=backend, **layer.deltas,
    )  # fmt: skip
    layer.check(result, offsets, index)


def test_float64_is_computed_in_float64() -> None:
    for form in FORMS:
        layer = conv_layer(form, {"padding": 1}, dtype=torch.float64)
        for offsets in (OFFSETS, None):
            exact = layer.row_by_row(offsets, INDEX)
            torch.testing.assert_close(run(layer, offsets, padding=1), exact, rtol=0, atol=1e-12)


VALID = {
    "x": torch.zeros(4, 3, 5, 5),
    "weight": torch.zeros(2, 3, 3, 3),
    "offsets": torch.tensor([0, 1, 4]),
    "up": torch.zeros(2, 2, 1),
    "down": torch.zeros(2, 1, 3, 3, 3),
}

INVALID = [
    ({"x": torch.zeros(3, 5, 5)}, ValueError, r"x must have shape \(\*, \*, \*, \*\)"),
    ({"weight": torch.zeros(2, 1, 3, 3)}, ValueError, r"weight must have shape \(\*, 3, \*, \*\)"),
    (
        {"weight": torch.zeros(0, 3, 3, 3)},
        ValueError,
        r"weight must have elements, got float32 tensor of shape \(0, 3,",
    ),
    ({"down": torch.zeros(2, 1, 27)}, ValueError, r"down must have shape \(2, 1, 3, 3, 3\)"),
    ({"offsets": torch.tensor([0, 2, 3])}, ValueError, r"offsets must run from 0 to the 4 rows of x"),
    ({"padding": 2**62}, ValueError, r"padding must be between 0 and 32768, got 4611686018427387904"),
    ({"stride": 0}, ValueError, r"stride must be between 1 and 32768, got 0"),
    ({"padding": "same"}, TypeError, r"padding must be an integer, got 'same'"),
    ({"padding": (1, -1)}, ValueError, r"padding must be between 0 and 32768, got -1"),
    ({"dilation": (1, 1, 1)}, ValueError, r"dilation must be an integer or two, got \(1, 1, 1\)"),
    ({"dilation": 3}, ValueError, r"x must be at least as large as the window with its padding, got float32 tensor"),
]


@pytest.mark.parametrize(("change", "error", "message"), INVALID)
def test_invalid_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"delta_conv2d: .*{message}"):
        ops.delta_conv2d(**{**VALID, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["dense", "rank 3", "bias"])
@pytest.mark.parametrize("offsets", [OFFSETS, None], ids=["segments", "shared"])
def test_opcheck(form: str, offsets: Tensor | None) -> None:
    layer = conv_layer(form, {})
    x = layer.x.to(memory_format=torch.channels_last)
    deltas = [layer.deltas.get(name) for name in ("delta", "up", "down", "bias_delta")]
    window = ([1, 2], [1, 0], [1, 1])
    arguments = (x, layer.weight, layer.bias, here(offsets), *deltas, here(INDEX), *window, "reference")
    torch.library.opcheck(torch.ops.guda_fast.delta_conv2d.default, arguments)


def test_compiles_into_one_graph() -> None:
    layer = conv_layer("rank 3", {"padding": 1})

    @torch.compile(fullgraph=True, backend="aot_eager")
    def double(x: Tensor) -> Tensor:
        return 2 * run(replace(layer, x=x), OFFSETS, padding=1)

    torch.testing.assert_close(double(layer.x), 2 * run(layer, OFFSETS, padding=1), rtol=0, atol=0)
