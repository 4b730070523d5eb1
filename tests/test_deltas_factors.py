"""Low-rank differences that are read when asked for, among the tensors of one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from guda_fast.deltas.base import Base
from guda_fast.deltas.delta import Dense, LowRank, Part
from guda_fast.deltas.diff import differences, fitting
from guda_fast.deltas.weights import Entry, Factors, Weights, from_module
from guda_fast.errors import CheckpointError


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.embed = torch.nn.Linear(4, 5, bias=False)
        self.head = torch.nn.Linear(4, 5)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(2, 2, dtype=torch.int64))


@pytest.fixture
def base() -> Base:
    torch.manual_seed(0)
    return Base(Net(), None, None, "base")


def factors(
    shape: tuple[int, ...] = (4, 3, 3, 3),
    up: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Factors:
    up = torch.ones(shape[0], 2) if up is None else up
    down = torch.ones(2, *shape[1:]) if down is None else down
    return Factors("adapter.bin", "conv.lora_up", lambda: LowRank(up, down), shape, dtype)


def formed(base: Base, weights: Weights) -> dict[str, Part]:
    values = dict(base.model.named_parameters()) | dict(base.model.named_buffers())
    weights = fitting(base.tensors, weights)
    return dict(differences(base.tensors, weights, lambda name: values[name].detach()))


def test_adapters_change_what_they_hold_and_nothing_else(base: Base) -> None:
    bias = torch.full((4,), 0.5)
    weights = Weights(
        "adapter",
        {"conv.bias": Entry("adapter", lambda: bias, shape=(4,))},
        factors={"embed.weight": factors((5, 4)), "conv.weight": factors()},
        complete=False,
    )
    parts = formed(base, weights)
    assert list(parts) == ["conv.bias", "conv.weight", "embed.weight"]
    assert isinstance(parts["conv.weight"], LowRank) and isinstance(parts["conv.bias"], Dense)
    assert torch.equal(parts["conv.bias"].value, bias - base.model.conv.bias)
    assert torch.equal(parts["embed.weight"].full(torch.Size((5, 4))), torch.full((5, 4), 2.0))


def test_factors_of_zero_change_nothing(base: Base) -> None:
    weights = Weights("a", {}, factors={"conv.weight": factors(up=torch.zeros(4, 2))}, complete=False)
    assert formed(base, weights) == {}


def test_only_what_is_asked_for_is_read(base: Base) -> None:
    read: list[str] = []

    def reading(name: str, shape: tuple[int, ...]) -> Factors:
        given = factors(shape)
        return replace(given, read=lambda: (read.append(name), given.read())[1])

    found = {"conv.weight": reading("conv.weight", (4, 3, 3, 3)), "embed.weight": reading("embed.weight", (5, 4))}
    weights = fitting(base.tensors, Weights("a", {}, factors=found, complete=False))
    assert read == []
    values = {"embed.weight": base.model.embed.weight.detach()}
    assert [name for name, _ in differences(base.tensors, weights, values.__getitem__, {"embed.weight"})] == read
    assert read == ["embed.weight"]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("conv.gain", factors, "key 'conv.gain' is not in the base"),
        ("conv.weight", lambda: factors((4, 3, 1, 1)), r"'conv.lora_up' must have shape \(4, 3, 3, 3\) as in the base"),
        ("count", lambda: factors((2, 2)), "'conv.lora_up' must be bool or .* found float32"),
        ("conv.weight", lambda: factors(dtype=torch.int8), "'conv.lora_up' must be float32 or .* found int8"),
        (
            "conv.weight",
            lambda: factors(down=torch.ones(3, 3, 3, 3)),
            r"'conv.lora_up' must have up \(O, r\) and down .* found \(4, 2\) and \(3, 3, 3, 3\)",
        ),
        (
            "conv.weight",
            lambda: factors(up=torch.full((4, 2), float("nan"))),
            "'conv.lora_up' must be finite, found 8 NaN or infinite of 8 values",
        ),
    ],
)
def test_factors_that_do_not_fit_are_refused(base: Base, name: str, given: Callable[[], Factors], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^adapter.bin: (key )?{message}"):
        formed(base, Weights("a", {}, factors={name: given()}, complete=False))


def test_a_parameter_has_one_difference(base: Base) -> None:
    entry = Entry("a", lambda: torch.ones(5, 4), shape=(5, 4))
    for weights in (
        Weights("a", {"embed.weight": entry}, factors={"embed.weight": factors((5, 4))}, complete=False),
        Weights("a", {"head.weight": entry}, factors={"embed.weight": factors((5, 4))}, complete=False),
        Weights("a", {}, factors={"head.weight": factors((5, 4)), "embed.weight": factors((5, 4))}, complete=False),
    ):
        with pytest.raises(CheckpointError, match="'conv.lora_up' must be all that is given for 'embed.weight', found"):
            formed(base, weights)


def test_complete_weights_lack_nothing(base: Base) -> None:
    weights = from_module(base.model, "g")
    del weights.entries["conv.bias"]  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="g: key 'conv.bias' is missing"):
        formed(base, weights)
    assert formed(base, replace(weights, complete=False)) == {}
