"""A model on small inputs before it is batched: what each layer's input depends on, and whether batching is right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from guda_fast.deltas.weights import named_tensors
from guda_fast.errors import BatchedUnavailableError
from guda_fast.forward._batched_leaves import leaves
from guda_fast.forward._routing import FACTORS, Inputs, Kind, RowModels, map_rows

# Of the largest value. A rehearsal runs in float64, where only the float32 parts of a network (time embeddings, some
# norms) round visibly; a layer with the wrong one of two models that differ by SPREAD is off by far more.
TOLERANCE = 1e-5
SPREAD = 0.05
_ROWS = (2, 3)  # of the two probes that tell rows from other sizes
_SEED = 2**31 - 19


class Rehearsal:
    """A copy of a model in float64 whose parameters are all random, and a second one that some tensors differ in.

    model: is only read. changed: the tensors that any group changes, by first name. example: of the model's inputs.
    """

    def __init__(self, model: nn.Module, changed: Collection[str], example: Inputs) -> None:
        with torch.no_grad():
            self.model = torch.nn.Module.to(copy.deepcopy(model), torch.float64)
            self._random = torch.Generator().manual_seed(_SEED)
            tensors = named_tensors(self.model)
            for parameter in self.model.parameters():
                parameter.copy_(self._perturbed(parameter))
            self.differences = {name: self._perturbed(tensors[name]) - tensors[name] for name in sorted(changed)}
            self._example = example
            self.inputs = self._inputs(_ROWS[1], shift=0)

    @contextmanager
    def second(self) -> Iterator[nn.Module]:
        """The model with all changed tensors different."""
        tensors = named_tensors(self.model)
        before = {name: tensors[name].clone() for name in self.differences}
        with torch.no_grad():
            for name, difference in self.differences.items():
                tensors[name].add_(difference)
            yield self.model
            for name, value in before.items():
                tensors[name].copy_(value)

    @torch.no_grad()
    def dependences(self, owners: Collection[str]) -> dict[str, Kind | None]:
        """What the input of each leaf that runs depends on; None where its first dimension is not the rows.

        Found by changing one factor at a time: what stays the same bit for bit does not depend on it.

        owners: the leaves that have a changed tensor
        Raises BatchedUnavailableError for a leaf whose models differ, and whose rows are not those of x.
        """
        inputs = self.inputs.take(torch.arange(_ROWS[0], device=self.inputs.x.device))
        first, larger = _leaf_inputs(self.model, inputs), _leaf_inputs(self.model, self.inputs)
        other = self._inputs(_ROWS[0], shift=1)

        def dependent(model: nn.Module, given: Inputs) -> set[str]:
            calls = _leaf_inputs(model, given)
            return {name for name in first if not _equal(first[name], calls.get(name, []))}

        depending = {
            "sample": dependent(self.model, inputs._replace(x=other.x)),
            "timestep": dependent(self.model, inputs._replace(timestep=other.timestep)),
            "condition": dependent(self.model, inputs._replace(conditions=other.conditions)),
        }
        with self.second() as model:
            depending["model"] = dependent(model, inputs)
        found: dict[str, Kind | None] = {}
        for name, calls in first.items():
            kind = frozenset(factor for factor in FACTORS if name in depending[factor])
            by_row = all(_has_rows(calls, rows) for calls, rows in zip((calls, larger[name]), _ROWS, strict=True))
            if not by_row and ("model" in kind or name in owners):
                shapes = [tuple(call.shape) for call in larger[name]]
                raise BatchedUnavailableError(
                    f"BatchedModel: layer {name!r} must be called with one row for each row of x where its result "
                    f"depends on the model, got inputs of shapes {shapes} for {_ROWS[1]} rows"
                )
            found[name] = kind if by_row else None
        return found

    @torch.no_grad()
    def check(self, batched: nn.Module, run: Callable[[Inputs, RowModels], Tensor]) -> None:
        """Compare a batched model of the base and the second one with the two themselves, at two numbers of rows.

        batched: the network that ``run`` runs
        Raises BatchedUnavailableError naming the first layer whose result differs.
        """
        self._compare(batched, run, rows=[0, 0], models=[0, 1])
        self._compare(batched, run, rows=[2, 1, 0, 1, 0], models=[1, 0, 1, 1, 0])

    def _compare(
        self, batched: nn.Module, run: Callable[[Inputs, RowModels], Tensor], rows: list[int], models: list[int]
    ) -> None:
        inputs = self.inputs.take(torch.tensor(rows, device=self.inputs.x.device))
        numbered = RowModels(models, rows, rows, rows)
        base = inputs.run(self.model)
        with self.second() as model:
            second = inputs.run(model)
        if _close(run(inputs, numbered), _chosen([base, second], models)):
            return
        results = _leaf_outputs(batched, lambda: run(inputs, numbered))
        raise BatchedUnavailableError(
            f"BatchedModel: {self._first_difference(results, inputs, models)} must give the same for rows of "
            "different models in one batch as for each model by itself, got another result"
        )

    def _first_difference(self, found: Mapping[str, list[Tensor]], inputs: Inputs, models: Sequence[int]) -> str:
        """The first layer, in the order of execution, with rows unlike those of the models themselves."""
        base = _leaf_outputs(self.model, lambda: inputs.run(self.model))
        with self.second() as model:
            second = _leaf_outputs(model, lambda: inputs.run(model))
        order = torch.tensor(sorted(range(len(models)), key=models.__getitem__), device=inputs.x.device)
        for name, calls in found.items():
            for call, zero, one in zip(calls, base[name], second[name], strict=False):
                if len(zero) == len(models) and not _close(call, _chosen([zero, one], models)[order]):
                    return f"layer {name!r}"
        return "the prediction"

    def _perturbed(self, tensor: Tensor) -> Tensor:
        """The tensor with noise; where it is zero, as layers begin whose effect would not be seen, as large as in
        layers that are not."""
        if not tensor.is_floating_point():
            return tensor
        size = float(tensor.square().mean().sqrt())
        scale = SPREAD * size if size > 0 else max(1, tensor[:1].numel()) ** -0.5
        return tensor + scale * self._normal(tensor)

    def _inputs(self, rows: int, shift: int) -> Inputs:
        """Inputs like the example's with other values in each row, and for another ``shift``."""
        x, timestep, conditions = self._example
        count = torch.arange(rows, device=x.device)
        image = self._normal(x.new_empty(rows, *x.shape[1:], dtype=torch.float64))
        times = torch.randperm(97, generator=self._random)[:rows].to(x.device, timestep.dtype)

        def other(value: Tensor) -> Tensor:
            value = value[count % len(value)]
            if value.is_floating_point():
                return self._normal(value.double())
            if value.dtype == torch.bool:
                return value  # A mask, and one of nothing would leave no number.
            odd = (count + shift).view(-1, *[1] * (value.dim() - 1)) % 2 == 1
            return torch.where(odd, torch.where(value > 0, value - 1, value + 1), value)

        return Inputs(image.contiguous(memory_format=_format(x)), times, map_rows(other, len(x), conditions))

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._random, dtype=torch.float64).to(like)


def _leaf_inputs(model: nn.Module, inputs: Inputs) -> dict[str, list[Tensor]]:
    """What each leaf is called with, call by call; names in the order of the first calls."""
    seen: dict[str, list[Tensor]] = {}

    def before(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise BatchedUnavailableError(
                f"BatchedModel: layer {name!r} must be called with one tensor and nothing else, got {len(args)} "
                f"arguments and {len(kwargs)} by name"
            )
        seen.setdefault(name, []).append(args[0].clone())

    with _hooked(model, lambda name, leaf: leaf.register_forward_pre_hook(partial(before, name), with_kwargs=True)):
        inputs.run(model)
    return seen


def _leaf_outputs(model: nn.Module, run: Callable[[], object]) -> dict[str, list[Tensor]]:
    """What each leaf gives, call by call; names in the order of the first calls."""
    seen: dict[str, list[Tensor]] = {}

    def after(name: str, _module: nn.Module, _args: object, out: Tensor) -> None:
        seen.setdefault(name, []).append(out.clone())

    with _hooked(model, lambda name, leaf: leaf.register_forward_hook(partial(after, name))):
        run()
    return seen


@contextmanager
def _hooked(model: nn.Module, register: Callable[[str, nn.Module], Any]) -> Iterator[None]:
    handles = [register(name, module) for name, module in leaves(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _equal(calls: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(calls) == len(others) and all(map(torch.equal, calls, others))


def _has_rows(calls: Sequence[Tensor], rows: int) -> bool:
    return all(call.dim() > 0 and len(call) == rows for call in calls)


def _chosen(results: Sequence[Tensor], models: Sequence[int]) -> Tensor:
    """Row r of the result of its model."""
    return torch.stack([results[model][row] for row, model in enumerate(models)])


def _close(found: Tensor, expected: Tensor) -> bool:
    """False for NaN, too."""
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _format(x: Tensor) -> torch.memory_format:
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
