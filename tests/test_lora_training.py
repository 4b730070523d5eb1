"""Runs that share a base: each is what it is alone, and the user's model stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conditional import MODELS, conditions_of
from guda_fast.counterfactuals.lora import LoraStudents
from guda_fast.counterfactuals.students import Inputs, forward
from tiny import perturbed, tiny_unet

RUNS = ("cat", "dog", "a.b/c d")
ROWS = {"cat": 2, "dog": 3, "a.b/c d": 1}
# Of float64 results that differ in the order of their sums: some 1e4 roundings of 1.1e-16 each, and room.
CLOSE: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-10}


def unconditional() -> nn.Module:
    return perturbed(tiny_unet(), 0.05)


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {"none": unconditional, **MODELS}


def students_of(base: nn.Module, runs: tuple[str, ...] = RUNS, **options: Any) -> LoraStudents:
    return LoraStudents(base, runs, **{"rank": 2, "alpha": 3.0, **options})


def randomise(students: LoraStudents, runs: tuple[str, ...] = RUNS) -> None:
    """Factors as after a training: else the products are zero."""
    for run in runs:
        random = torch.Generator().manual_seed(len(run))
        for parameter in students.parameters(run):
            with torch.no_grad():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype))


def inputs_for(network: str, base: nn.Module) -> dict[str, Inputs]:
    """Rows of each run, of different numbers."""
    random = torch.Generator().manual_seed(7)
    dtype = next(base.parameters()).dtype
    found = {}
    for run, rows in ROWS.items():
        x_t = torch.randn(rows, base.config.in_channels, 8, 8, generator=random).to(dtype)
        t = torch.randint(1000, (rows,), generator=random)
        row = torch.randint(3, (rows,), generator=random)
        condition = {}
        if network != "none":
            condition = conditions_of(network, row.tolist()).to(torch.device("cpu"), dtype).take(row)
        found[run] = Inputs(x_t, t, condition)
    return found


def losses(predictions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A target that is not zero, so that gradients are of no special form."""
    return {run: (prediction - 0.5).square().mean() for run, prediction in predictions.items()}


@pytest.mark.parametrize("network", NETWORKS)
def test_runs_begin_as_the_base(network: str) -> None:
    base = NETWORKS[network]().double()
    given = inputs_for(network, base)
    with torch.no_grad():
        found = students_of(base).predict(given)
        for run, rows in given.items():
            torch.testing.assert_close(found[run], forward(base, rows), **CLOSE)


@pytest.mark.parametrize("network", NETWORKS)
def test_predictions_and_gradients_are_those_of_merged_models_one_by_one(network: str) -> None:
    base = NETWORKS[network]().double()
    students = students_of(base)
    randomise(students)
    given = inputs_for(network, base)
    found = students.predict(given)
    torch.stack(list(losses(found).values())).sum().backward()
    for run, rows in given.items():
        model = students.model(run).requires_grad_(True)
        prediction = forward(model, rows)
        torch.testing.assert_close(found[run], prediction, **CLOSE)
        losses({run: prediction})[run].backward()
        gradients = iter(parameter.grad for parameter in students.parameters(run))
        for name, (up, down) in students.factors(run).items():
            # dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW.
            weight = model.get_parameter(f"{name}.weight").grad.flatten(1)
            torch.testing.assert_close(next(gradients), 1.5 * weight @ down.flatten(1).T, **CLOSE)
            torch.testing.assert_close(next(gradients), (1.5 * up.T @ weight).view_as(down), **CLOSE)
        assert next(gradients, None) is None


def trained(base: nn.Module, runs: tuple[str, ...], steps: int = 3) -> dict[str, dict[str, Tensor]]:
    """The factors after some plain steps, in which runs take part in turns too."""
    students = students_of(base, runs)
    optimizers = {run: torch.optim.SGD(students.parameters(run), lr=0.5) for run in runs}
    given = inputs_for("classes", base)
    for step in range(steps):
        # The last run drops out after the first step.
        active = [run for run in runs if step == 0 or run != RUNS[-1]]
        if not active:
            break
        torch.stack(list(losses(students.predict({run: given[run] for run in active})).values())).sum().backward()
        for run in active:
            optimizers[run].step()
            optimizers[run].zero_grad()
    return {run: students.state(run) for run in runs}


def test_together_is_as_alone() -> None:
    base = NETWORKS["classes"]().double()
    together = trained(base, RUNS)
    for run in RUNS:
        alone = trained(base, (run,))[run]
        assert any(bool(factor.any()) for name, factor in alone.items() if name.endswith(".up"))
        for name, factor in alone.items():
            torch.testing.assert_close(together[run][name], factor, **CLOSE)


def test_two_losses_of_one_forward_have_gradients_of_their_own() -> None:
    """As a bound on the forget gradient's norm needs them."""
    base = unconditional().double()
    students = students_of(base, ("cat",))
    randomise(students, ("cat",))
    prediction = students.predict({"cat": inputs_for("none", base)["cat"]})["cat"]
    parameters = students.parameters("cat")
    first = torch.autograd.grad(prediction[:1].square().sum(), parameters, retain_graph=True)
    second = torch.autograd.grad(prediction[1:].square().sum(), parameters, retain_graph=True)
    both = torch.autograd.grad(prediction.square().sum(), parameters)
    for one, other, total in zip(first, second, both, strict=True):
        torch.testing.assert_close(one + other, total, **CLOSE)


def test_the_users_model_stays_as_it_was_and_is_the_only_one_in_memory() -> None:
    base = unconditional()
    base.conv_in.weight.requires_grad_(False)
    before = copy.deepcopy(base.state_dict())
    students = students_of(base)
    given = inputs_for("none", base)
    for step in range(2):
        torch.stack(list(losses(students.predict(given)).values())).sum().backward()
        for run in RUNS:
            torch.optim.SGD(students.parameters(run), lr=0.1 + step).step()
    students.model("cat").conv_in.weight.zero_()
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert [name for name, value in base.named_parameters() if not value.requires_grad] == ["conv_in.weight"]
    assert all(value.grad is None for value in base.parameters())
    assert not base.training
    own = {value.data_ptr() for value in students._network.parameters()}
    assert own == {value.data_ptr() for value in base.parameters()}


def test_first_factors_depend_on_the_seed_alone() -> None:
    base = unconditional()
    first = students_of(base).state("cat")
    for other in (students_of(base).state("dog"), students_of(base, ("x",)).state("x")):
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert not any(bool(factor.any()) for name, factor in first.items() if name.endswith(".up"))
    downs = {name: factor for name, factor in first.items() if name.endswith(".down")}
    another = students_of(base, seed=1).state("cat")
    for name, down in downs.items():
        assert not torch.equal(down, another[name])
        assert float(down.abs().max()) <= down[0].numel() ** -0.5


def test_low_precision_bases_get_factors_in_float32() -> None:
    students = students_of(unconditional().bfloat16())
    assert {parameter.dtype for parameter in students.parameters("cat")} == {torch.float32}
    assert {value.dtype for value in students.model("cat").parameters()} == {torch.bfloat16}


def test_patterns_choose_the_layers() -> None:
    base = MODELS["prompts"]()
    keys = students_of(base, patterns="cross-attention-kv").factors("cat")
    assert keys and all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in keys)
    assert list(students_of(base, patterns=("conv_in.*",)).factors("cat")) == ["conv_in"]
    everything = students_of(base).factors("cat")
    assert {type(base.get_submodule(name)) for name in everything} == {nn.Linear, nn.Conv2d}
    with pytest.raises(ValueError, match="patterns must name the weight of a Linear layer or a convolution"):
        students_of(base, patterns=("*norm*",))


def test_a_layer_with_two_places_has_factors_in_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 1, 1)
            self.second = self.first

        def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
            return (self.second(self.first(sample)),)

    base = Twice().double()
    students = students_of(base, ("cat",))
    randomise(students, ("cat",))
    rows = Inputs(torch.ones(2, 1, 1, 1).double(), torch.zeros(2).long(), {})
    torch.testing.assert_close(students.predict({"cat": rows})["cat"], forward(students.model("cat"), rows), **CLOSE)


def test_state_goes_from_one_to_another() -> None:
    base = unconditional()
    students, other = students_of(base), students_of(base, ("dog",))
    randomise(students)
    other.load("dog", copy.deepcopy(students.state("dog")))
    for ours, theirs in zip(students.parameters("dog"), other.parameters("dog"), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    fewer = students_of(base, patterns=("conv_in.*",))
    with pytest.raises(ValueError, match="state must hold the factors of 'cat', got others in .*conv_out.down"):
        fewer.load("cat", students.state("cat"))


def test_gradient_checkpointing_changes_nothing() -> None:
    base = unconditional().double()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            base.enable_gradient_checkpointing()
        students = students_of(base)
        randomise(students)
        torch.stack(list(losses(students.predict(inputs_for("none", base))).values())).sum().backward()
        found.append([parameter.grad for run in RUNS for parameter in students.parameters(run)])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, **CLOSE)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"runs": ()}, ValueError, "runs must be distinct names, at least one"),
        ({"runs": ("a", "a")}, ValueError, r"runs must be distinct names, at least one, got \['a', 'a'\]"),
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": 2.0}, TypeError, "rank must be an integer"),
        ({"alpha": 0}, ValueError, "alpha must be finite and at least"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"LoraStudents: {message}"):
        students_of(unconditional(), **options)
