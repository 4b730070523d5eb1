"""The delta ops with gradients: against finite differences, and against one model after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delta_cases import BACKENDS, DEVICE
from guda_fast._backends import use_backend
from guda_fast.counterfactuals._lora_layers import (
    FactoredLayer,
    Factors,
    Segments,
    _ConvStep,
    branch_gradients,
    merged_gradients,
    takes_factors,
)
from guda_fast.reference.delta_conv2d import Window

SIZES = {"equal": (3, 3), "one": (4,), "unequal": (1, 0, 4), "none": (0, 0)}
RANK = 2
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 5), (4,)),
    "linear, tokens, no bias": (nn.Linear(4, 3, bias=False), (2, 4)),
    "conv": (nn.Conv2d(2, 3, 3, padding=1), (2, 5, 4)),
    "conv, 1x1": (nn.Conv2d(2, 4, 1, bias=False), (2, 3, 3)),
    "conv, strided": (nn.Conv2d(3, 2, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (3, 6, 5)),
}


class Case:
    """A layer for some models' rows, and what it gives for them."""

    def __init__(self, layer: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
        base, shape = LAYERS[layer]
        random = torch.Generator().manual_seed(len(layer) + sum(sizes))

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=random).to(DEVICE, dtype)

        self.base = type(base)(**_arguments(base)).to(DEVICE, dtype).requires_grad_(False)
        for parameter in self.base.parameters():
            parameter.copy_(normal(*parameter.shape))
        weight = self.base.weight
        self.sizes, self.segments = sizes, Segments.of(sizes, torch.device(DEVICE))
        self.x = normal(sum(sizes), *shape)
        self.factors = [Factors(normal(len(weight), RANK), normal(RANK, *weight.shape[1:])) for _ in sizes]
        self.layer = FactoredLayer("a.layer", self.base, 0.5)

    def inputs(self) -> list[Tensor]:
        return [self.x, *(factor for factors in self.factors for factor in factors)]

    def together(self, x: Tensor, *factors: Tensor) -> Tensor:
        self.layer.expect(list(map(Factors, factors[::2], factors[1::2])), self.segments)
        out: Tensor = self.layer(x)
        return out

    def one_by_one(self, x: Tensor, *factors: Tensor) -> Tensor:
        """Each model's rows through a layer whose weight has its factors."""
        parts = []
        for up, down, own in zip(factors[::2], factors[1::2], x.split(self.sizes), strict=True):
            weight = self.base.weight.to(x) + 0.5 * torch.tensordot(up, down, dims=1)
            bias = None if self.base.bias is None else self.base.bias.to(x)
            window = [getattr(self.base, name, None) for name in ("stride", "padding", "dilation")]
            parts.append(F.conv2d(own, weight, bias, *window) if x.dim() == 4 else F.linear(own, weight, bias))
        return torch.cat(parts)


def _arguments(layer: nn.Module) -> dict[str, Any]:
    names = {
        nn.Linear: ("in_features", "out_features"),
        nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
    }[type(layer)]
    return {"bias": layer.bias is not None, **{name: getattr(layer, name) for name in names}}


def gradients(run: Any, inputs: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    given = [tensor.detach().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(run(*given), given, upstream)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_those_of_finite_differences(layer: str, sizes: str) -> None:
    case = Case(layer, SIZES[sizes], torch.float64)
    inputs = [tensor.requires_grad_() for tensor in case.inputs()]
    assert torch.autograd.gradcheck(case.together, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("layer", LAYERS)
def test_values_and_gradients_are_those_of_one_model_after_another(layer: str, sizes: str, backend: str) -> None:
    case = Case(layer, SIZES[sizes], torch.float32)
    inputs, exact = case.inputs(), [tensor.double() for tensor in case.inputs()]
    expected = case.one_by_one(*exact)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with use_backend(backend):
        out = case.together(*inputs)
        found = gradients(case.together, inputs, upstream)
    # Products of up to three factors, in sums of at most so many terms, in float32.
    terms = case.base.weight.numel() + case.x.numel() + expected.numel()
    unit = 2 * terms * 2.0**-24
    plain = gradients(case.one_by_one, exact, upstream.double())
    for parameter in case.base.parameters():
        parameter.abs_()
    sizes_of = gradients(case.one_by_one, [tensor.abs() for tensor in exact], upstream.double().abs())
    bounds = [case.one_by_one(*(tensor.abs() for tensor in exact)), *sizes_of]
    for ours, theirs, bound in zip((out, *found), (expected, *plain), bounds, strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == theirs.shape
        assert bool(((ours.double() - theirs).abs() <= unit * bound).all())


@pytest.mark.parametrize("of_x", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("layer", [name for name in LAYERS if name.startswith("conv")])
def test_all_ways_to_a_convolutions_gradients_agree(layer: str, sizes: str, of_x: bool) -> None:
    case = Case(layer, SIZES[sizes], torch.float64)
    up, down = (torch.stack(factors) for factors in zip(*case.factors, strict=True))
    grad = case.together(*case.inputs()).cos()
    window = Window(*(getattr(case.base, name) for name in Window._fields))
    step = _ConvStep(case.x, case.base.weight, up, down, grad, case.segments, window, of_x)
    expected = merged_gradients(step)
    for together in (True, False):
        for ours, theirs in zip(branch_gradients(step, together=together), expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                # Sums of at most a few hundred products of three normals.
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_base_gets_no_gradient_and_rows_only_where_asked(layer: str) -> None:
    case = Case(layer, (2, 2), torch.float64)
    x, *factors = case.inputs()
    given = [factor.requires_grad_() for factor in factors]
    case.together(x, *given).square().sum().backward()
    assert all(factor.grad is not None for factor in given)
    assert x.grad is None
    assert all(parameter.grad is None for parameter in case.base.parameters())


@pytest.mark.parametrize("layer", LAYERS)
def test_autocast_computes_in_its_dtype_and_factors_keep_theirs(layer: str) -> None:
    case = Case(layer, (2, 2), torch.float32)
    given = [tensor.requires_grad_() for tensor in case.inputs()]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = case.together(*given)
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out.float().sum(), given)
    assert all(gradient.dtype == torch.float32 for gradient in found)
    rounded = Case(layer, (2, 2), torch.float32)
    for parameter in rounded.base.parameters():
        parameter.copy_(parameter.bfloat16())
    exact = rounded.together(*(tensor.detach().bfloat16().float() for tensor in given))
    # The scale is rounded into up, a hidden value to 8 bits, and three parts with their sum.
    bound = 8 * 2.0**-8 * exact.abs().max()
    assert float((out.detach().float() - exact).abs().max()) <= bound


def test_rows_that_are_not_images_are_named() -> None:
    case = Case("linear", (2, 2), torch.float32)
    case.together(*case.inputs())
    with pytest.raises(ValueError, match="layer 'a.layer' must get one row for each of the 4 images of a step, got 3"):
        case.layer(case.x[:3])


def test_a_network_that_reads_the_weight_is_told() -> None:
    layer = Case("conv", (1,), torch.float32).layer
    with pytest.raises(AttributeError, match="'a.layer' must be called by its network, got one that reads its weight"):
        _ = layer.weight
    with pytest.raises(AttributeError, match="no attribute 'kernel_size'"):
        _ = layer.kernel_size


def test_which_layers_take_factors() -> None:
    assert takes_factors(nn.Linear(2, 2)) and takes_factors(nn.Conv2d(2, 2, 3, padding=1))
    others = (
        nn.Conv2d(2, 2, 3, groups=2),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.ConvTranspose2d(2, 2, 3),
        nn.Embedding(2, 2),
        nn.Identity(),
    )
    assert not any(takes_factors(module) for module in others)
