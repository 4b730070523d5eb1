"""What a batched model refuses, by name: networks that cannot be batched, and calls that do not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guda_fast.deltas import DeltaBank
from guda_fast.errors import BatchedUnavailableError
from guda_fast.forward._routing import RowModels
from guda_fast.forward.batched import BatchedModel
from test_batched import randomised, unet
from tiny import perturbed


class Network(nn.Module):
    """One layer, and something around it."""

    def __init__(self, around: Callable[[Network, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.own = nn.Parameter(torch.ones(4))
        self.around = around
        self.config = SimpleNamespace(in_channels=2, sample_size=4)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.last(self.around(self, sample)),)


def bank(model: nn.Module, *names: str) -> DeltaBank:
    """One group that differs in these tensors; in those of all layers without names."""
    noisy, other = perturbed(model), copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in names or (not names and "." in name):
                parameter.copy_(noisy.get_parameter(name))
    return DeltaBank.load(model, {"a": other})


def test_tensors_of_no_layer() -> None:
    network = Network(lambda self, x: self.own * self.layer(x))
    with pytest.raises(BatchedUnavailableError, match="key 'own' must belong to a Linear, .* got a tensor of Network"):
        BatchedModel(bank(network, "own", "layer.weight"))
    BatchedModel(bank(network))
    fourier = randomised(lambda: unet(time_embedding_type="fourier"))
    with pytest.raises(BatchedUnavailableError, match="key 'time_proj.weight' must .* of GaussianFourierProjection"):
        BatchedModel(bank(fourier, "time_proj.weight"))


def test_weights_read_by_another_module() -> None:
    network = Network(lambda self, x: x @ self.layer.weight)
    with pytest.raises(BatchedUnavailableError, match="layer.weight must only be used by its own layer"):
        BatchedModel(bank(network))
    found = run(BatchedModel(bank(network, "last.weight")))
    assert found.shape == (3, 2, 4, 4), "the same weight for all models may be read"


def test_fir_blocks_whose_weights_are_read() -> None:
    from diffusers.models.downsampling import FirDownsample2D

    class Fir(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = FirDownsample2D(2, 2, use_conv=True)
            self.config = SimpleNamespace(in_channels=2, sample_size=4)

        def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            return (self.inner(sample),)

    with pytest.raises(BatchedUnavailableError, match="inner.Conv2d_0.weight must only be used by its own layer"):
        BatchedModel(bank(Fir(), "inner.Conv2d_0.weight"))


def test_layers_without_a_row_for_each_row() -> None:
    network = Network(lambda self, x: self.layer(x).flatten(0, 1).view(*x.shape))
    BatchedModel(bank(network))
    tokens = Network(lambda self, x: self.last(self.layer(x.flatten(0, 1))).view(x.shape))
    with pytest.raises(BatchedUnavailableError, match=r"layer 'layer' must .* got inputs of shapes \[\(6, 4, 4\)\]"):
        BatchedModel(bank(tokens, "layer.weight"))
    with pytest.raises(BatchedUnavailableError, match="layer 'last' must be called with one row"):
        BatchedModel(
            bank(Network(lambda self, x: self.last(self.layer(x).flatten(0, 1)).view(x.shape)), "layer.weight")
        )


def test_rows_that_see_each_other() -> None:
    network = Network(lambda self, x: (lambda y: y - y.mean(0))(self.layer(x)))
    with pytest.raises(BatchedUnavailableError, match="layer 'last' must give the same for rows of different models"):
        BatchedModel(bank(network))


def run(batched: BatchedModel, **change: Any) -> Tensor:
    x, timestep = torch.randn(3, 2, 4, 4), torch.tensor([1, 2, 3])
    rows = RowModels([0, 1, 1], [0, 1, 2], [1, 2, 3])
    named = {"x": x, "timestep": timestep, "rows": rows, **change}
    return batched(named.pop("x"), named.pop("timestep"), named.pop("rows"), **named)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": "image"}, TypeError, "x must be a torch.Tensor"),
        ({"rows": [0, 1, 1]}, TypeError, "rows must be RowModels, got list"),
        ({"x": torch.zeros(0, 2, 4, 4)}, ValueError, "x must have at least one row, got none"),
        ({"x": torch.zeros(2, 2, 4, 4)}, ValueError, "rows must be as many as x has, 2, got 3"),
        ({"rows": RowModels([0, 2, 1], [0] * 3, [0] * 3)}, ValueError, "rows must have models up to 1, got 2"),
        ({"timestep": torch.tensor(3)}, ValueError, r"timestep must have shape \(3,\)"),
    ],
)
def test_calls_that_do_not_fit(change: dict[str, Any], error: type[Exception], message: str) -> None:
    batched = BatchedModel(bank(Network(lambda self, x: self.layer(x))))
    with pytest.raises(error, match=rf"BatchedModel: {message}"):
        run(batched, **change)


def test_a_bank_that_does_not_hold_its_base() -> None:
    models = bank(Network(lambda self, x: self.layer(x)))
    batched = BatchedModel(models)
    with models.applied("a"):
        for call in (lambda: BatchedModel(models), lambda: run(batched)):
            with pytest.raises(RuntimeError, match="bank must hold its base, got group 'a' applied"):
                call()
    run(batched)


def test_groups_and_examples_that_do_not_fit() -> None:
    models = bank(Network(lambda self, x: self.layer(x)))
    for groups, message in (([], "at least one"), ("a", "a sequence"), (["b"], "one of 'a'"), (["a", "a"], "differ")):
        with pytest.raises(ValueError, match=f"BatchedModel: groups must .*{message}"):
            BatchedModel(models, groups)
    models.model.config = None
    with pytest.raises(ValueError, match="BatchedModel: example must be given for a model whose configuration"):
        BatchedModel(models)
    BatchedModel(models, example=(torch.zeros(1, 2, 4, 4), torch.tensor([1]), {}))


def test_layers_that_the_example_does_not_show() -> None:
    """A layer that takes other rows in a call than it did in the example."""
    network = Network(lambda self, x: self.layer(x) if x.shape[1] == 2 else self.layer(x.flatten(0, 1)).view(x.shape))
    batched = BatchedModel(bank(network))
    with pytest.raises(
        RuntimeError, match="layer 'layer' must be called as in the example, with the 3 rows of the batch, got 15 rows"
    ):
        run(batched, x=torch.randn(3, 5, 4, 4))


def test_layers_that_the_example_does_not_reach() -> None:
    network = Network(lambda self, x: x if x.shape[1] == 2 else self.layer(x))
    batched = BatchedModel(bank(network))
    with pytest.raises(RuntimeError, match="layer 'layer' must be called as in the example, never, got 3 rows"):
        run(batched, x=torch.randn(3, 5, 4, 4))
