"""Many models through one forward of an unmodified diffusers model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from guda_fast._validate import check_choice, check_tensor
from guda_fast.deltas import DeltaBank
from guda_fast.deltas.delta import Dense, LowRank, Part
from guda_fast.deltas.weights import named_tensors
from guda_fast.errors import BatchedUnavailableError
from guda_fast.forward._routing import Inputs, Kind, RowModels

if TYPE_CHECKING:
    from guda_fast.forward._batched_layers import Layer

_WHERE = "BatchedModel"
_FORMS: Mapping[str, type[Part]] = {"dense": Dense, "low-rank": LowRank}  # of a survey's support
_LARGEST_SIDE = 32  # of the example that is made where none is given


class BatchedModel:
    """The base and the counterfactuals of a bank as one model, whose rows belong to any of them.

    The network is a copy of ``bank.model`` that shares its memory, in which each layer computes a row with the
    parameters of that row's model, and computes once what rows have in common: a layer that only sees the timestep runs
    once for each model and timestep; layers before the first one that any group changes run once for each sample.
    Which layer sees what is found by running a copy in float64 on small inputs, and so is whether it works at all. The
    user's model and the bank's stay as they are.

    bank: must hold its base, now and in each call, at the device, dtype and memory format of the calls; after
        ``bank.to`` make another one
    groups: the groups that rows may take, as models 1, 2, ... in this order; all of the bank's by default
    example: x, timestep and conditions by name as in a call, of one row or more; values do not matter, only that each
        integer of a condition may also be one less, or 1 for 0; booleans, which are masks, are kept. By default one row
        of the size in the model's configuration, 32 at most, and no condition

    Memory while it is made: the model in float64, and three times what any group changes; afterwards ``bytes``.
    Raises TypeError or ValueError naming the argument; BatchedUnavailableError where a changed tensor belongs to no
    layer that rows can share (Linear, Conv2d, ConvTranspose2d, Embedding and norms can), or the rehearsal's result is
    not that of separate models.

    >>> batched = BatchedModel(bank)  # doctest: +SKIP
    >>> batched(x, timestep, RowModels(model=[0, 1], sample=[0, 0], timestep=[9, 9]))  # doctest: +SKIP
    """

    def __init__(
        self,
        bank: DeltaBank,
        groups: Sequence[str] | None = None,
        example: tuple[Tensor, Tensor, Mapping[str, Any]] | None = None,
    ) -> None:
        self._bank = bank
        self._check_base()
        self.groups = _groups(bank, groups)
        supports = [bank.survey(group).support for group in self.groups]
        changed = {name for support in supports for name in support}
        owners = _owners(bank.model, changed)
        inputs = _rehearsed(bank.model, changed, owners, Inputs(*example) if example else _example(bank.model))
        forms = {name: {_FORMS[support[name]] for support in supports if name in support} for name in changed}
        self._skeleton = _Skeleton(bank.model, inputs, owners, forms, models=len(self.groups) + 1)
        self._fill()

    def __call__(self, x: Tensor, timestep: Tensor, rows: RowModels, **conditions: Any) -> Tensor:
        """The prediction of each row by its own model.

        x, timestep: as the network takes them [(R, C, H, W) and (R,), on the bank's device]
        rows: which model each row takes, and which rows share what [R rows]
        conditions: what else the network takes by name; tensors with R rows, in mappings and sequences too, go with x's

        Returns the network's result [x's rows]. Raises TypeError or ValueError naming the argument; RuntimeError where
        the bank does not hold its base.
        """
        x = check_tensor(_WHERE, "x", x, min_dim=1)
        if len(x) == 0:
            raise ValueError(f"{_WHERE}: x must have at least one row, got none")
        if not isinstance(rows, RowModels):
            raise TypeError(f"{_WHERE}: rows must be RowModels, got {type(rows).__name__}")
        if len(rows) != len(x):
            raise ValueError(f"{_WHERE}: rows must be as many as x has, {len(x)}, got {len(rows)}")
        if rows.highest > len(self.groups):
            raise ValueError(f"{_WHERE}: rows must have models up to {len(self.groups)}, got {rows.highest}")
        check_tensor(_WHERE, "timestep", timestep, shape=(len(x),), device=x.device)
        self._check_base()
        return self._skeleton(Inputs(x, timestep, conditions), rows)

    @property
    def bytes(self) -> int:
        """The memory that the differences take beside the base."""
        return sum(layer.bytes for layer in self._skeleton.layers.values())

    @property
    def computed_rows(self) -> Mapping[str, int]:
        """How many rows each layer that is routed computed in the last call, by name."""
        return MappingProxyType(self._skeleton.batch.computed)

    def _check_base(self) -> None:
        if self._bank.applied_group is not None:
            raise RuntimeError(f"{_WHERE}: bank must hold its base, got group {self._bank.applied_group!r} applied")

    def _fill(self) -> None:
        """Hand each group's parameters to the layers, one group at a time."""
        merges = any(layer.merges for layer in self._skeleton.layers.values())
        for k, group in enumerate(self.groups):
            # Not kept: what is in files stays there.
            parts = self._bank.deltas[self._bank.groups.index(group)].parts
            with self._bank.applied(group) if merges else nullcontext(self._bank.model) as model:
                self._skeleton.add(k + 1, parts, named_tensors(model))
        self._skeleton.finish()


class _Skeleton:
    """A copy of a model that shares its tensors, with leaves that know each row's model.

    inputs: what the input of each leaf depends on, None for leaves without rows. owners: the changed attributes of each
    leaf, with the tensor's first name. forms: what the differences of each changed tensor are like.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Kind | None],
        owners: Mapping[str, Mapping[str, str]],
        forms: Mapping[str, set[type[Part]]],
        models: int,
    ) -> None:
        from guda_fast.forward._batched_layers import make_layer, without_hooks
        from guda_fast.forward._batched_leaves import Batch, Leaf, install, leaves

        shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        self.model = copy.deepcopy(model, shared)
        self.batch = Batch()
        self.layers: dict[str, Layer] = {}
        self._owners = owners
        everything = frozenset[str]().union(*(kind for kind in inputs.values() if kind is not None))
        for name, module in leaves(self.model).items():
            own = owners.get(name, {})
            if not own and inputs.get(name) in (None, everything):
                continue
            original = without_hooks(module)
            if own:
                self.layers[name] = make_layer(original, models, forms.get(own.get("weight", ""), set()))
            leaf = Leaf(name, self.batch, original, inputs.get(name), frozenset(own), self.layers.get(name))
            install(module, leaf)

    def add(self, model: int, parts: Mapping[str, Part], tensors: Mapping[str, Tensor]) -> None:
        """Give a model its differences; ``tensors`` are its own, by name, for as long as this runs."""
        for name, layer in self.layers.items():
            own = {attribute: first for attribute, first in self._owners[name].items() if first in parts}
            if own:
                merged = {attribute: tensors[first] for attribute, first in own.items()}
                layer.add(model, {attribute: parts[first] for attribute, first in own.items()}, merged)

    def finish(self) -> None:
        for layer in self.layers.values():
            layer.finish()

    @torch.no_grad()
    def __call__(self, inputs: Inputs, rows: RowModels) -> Tensor:
        self.batch.computed.clear()
        self.batch.rows = rows
        order = rows.order(inputs.x.device)
        try:
            if order is None:
                return inputs.run(self.model)
            by_model, back = order
            return inputs.take(by_model).run(self.model)[back]
        finally:
            self.batch.rows = None


def _rehearsed(
    model: nn.Module, changed: set[str], owners: Mapping[str, Mapping[str, str]], example: Inputs
) -> dict[str, Kind | None]:
    """What the input of each leaf depends on, after a trial of the whole; frees its memory, which is large."""
    from guda_fast.forward._rehearsal import Rehearsal

    try:
        rehearsal = Rehearsal(model, changed, example)
        inputs = rehearsal.dependences(owners)
        trial = _Skeleton(rehearsal.model, inputs, owners, {name: {Dense} for name in changed}, models=2)
        with rehearsal.second() as second:
            differences = {name: Dense(value.cpu()) for name, value in rehearsal.differences.items()}
            trial.add(1, differences, named_tensors(second))
        trial.finish()
        rehearsal.check(trial.model, trial)
    except BatchedUnavailableError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise BatchedUnavailableError(
            f"{_WHERE}: the model must run in float64 on small random inputs, got {type(error).__name__}: {error}"
        ) from error
    return inputs


def _groups(bank: DeltaBank, groups: Sequence[str] | None) -> tuple[str, ...]:
    if groups is None:
        return bank.groups
    if isinstance(groups, str) or not groups:
        raise ValueError(f"{_WHERE}: groups must be a sequence of at least one name, got {groups!r}")
    chosen = tuple(check_choice(_WHERE, "groups", group, bank.groups) for group in groups)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{_WHERE}: groups must differ, got {chosen}")
    return chosen


def _owners(model: nn.Module, changed: set[str]) -> dict[str, dict[str, str]]:
    """Which attributes of which leaves are changed tensors; all that hold one have to be leaves."""
    from guda_fast.forward._batched_leaves import leaves

    tensors = named_tensors(model)
    first_names = {_place(tensors[name]): name for name in changed}
    routable = leaves(model)
    owners: dict[str, dict[str, str]] = {}
    for name, tensor in tensors.items():
        if _place(tensor) not in first_names:
            continue
        owner, _, attribute = name.rpartition(".")
        if owner not in routable:
            raise BatchedUnavailableError(
                f"{_WHERE}: key {name!r} must belong to a Linear, Conv2d, ConvTranspose2d, Embedding or norm layer to "
                f"differ between the rows of a batch, got a tensor of {type(model.get_submodule(owner)).__name__}"
            )
        owners.setdefault(owner, {})[attribute] = first_names[_place(tensor)]
    return owners


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are one and the same memory, also where they are two objects."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (id(tensor),)


def _example(model: nn.Module) -> Inputs:
    """One row of the size that the configuration says, without conditions."""

    config = getattr(model, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None or size is None:
        raise ValueError(f"{_WHERE}: example must be given for a model whose configuration has no size of its samples")
    height, width = (size, size) if isinstance(size, int) else size
    first = next(model.parameters())
    x = torch.zeros(1, channels, min(height, _LARGEST_SIDE), min(width, _LARGEST_SIDE), device=first.device)
    weights = [p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous()]
    if weights:
        x = x.contiguous(memory_format=torch.channels_last)
    return Inputs(x, torch.zeros(1, dtype=torch.int64, device=first.device), {})
