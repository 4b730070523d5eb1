"""The one model that runs: its tensors are overwritten in place, and the base can always be had back."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from typing import Any

import torch

from guda_fast.deltas.delta import Part, hash_tensors
from guda_fast.deltas.diff import FLOATING, INTEGER, BaseTensor, KeyProblem, check_finite, wide
from guda_fast.deltas.weights import named_tensors
from guda_fast.errors import CheckpointError


def base_tensors(model: torch.nn.Module, origin: str) -> list[BaseTensor]:
    """The parameters and buffers of ``model``, shared ones once; values share the model's memory if they can.

    Raises: CheckpointError for a tensor without finite values, or of a dtype that has no delta
    """
    tensors = named_tensors(model)
    persistent = model.state_dict(keep_vars=True).keys()
    names: dict[Hashable, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(_memory(tensor), []).append(name)
    return [
        BaseTensor(tuple(shared), _host_value(shared[0], tensors[shared[0]], origin), persistent.isdisjoint(shared))
        for shared in names.values()
    ]


class ResidentModel:
    """A model whose tensors are written in place, and exact copies of what its dtype or a delta would lose.

    model: the model, which this object owns; it is put into eval mode and takes no gradients
    base: its tensors, as ``base_tensors`` gives them
    changing: the names that some delta changes, for which theta_0 is kept on the host
    """

    def __init__(self, model: torch.nn.Module, base: Iterable[BaseTensor], changing: Collection[str]) -> None:
        self.model = model.eval().requires_grad_(False)
        self._changing = frozenset(changing)
        self._names: dict[str, tuple[str, ...]] = {}
        self._wide: dict[str, torch.dtype] = {}
        self._masters: dict[str, torch.Tensor] = {}
        tensors = named_tensors(model)
        self._stored = {name: tensor.dtype for name, tensor in tensors.items()}
        for tensor in base:
            self._names[tensor.name] = tensor.names
            self._wide[tensor.name] = tensor.value.dtype
            if tensor.name in self._changing:
                shared = _memory(tensor.value) == _memory(tensors[tensor.name])
                self._masters[tensor.name] = tensor.value.clone() if shared else tensor.value

    def write(self, parts: Iterable[tuple[str, Part | None]]) -> None:
        """Write theta_0 + part, or theta_0 where the part is None, into the named tensors."""
        tensors = named_tensors(self.model)
        with torch.no_grad():
            for name, part in parts:
                self._write(tensors, name, part)

    def move(self, **how: Any) -> None:
        """``model.to(**how)``; must hold the base. What a narrower dtype would lose is kept on the host."""
        dtype: torch.dtype | None = how.get("dtype")
        tensors = named_tensors(self.model)
        lossy = [name for name in self._names if dtype is not None and self._loses(name, dtype)]
        for name in lossy:
            if name not in self._masters:
                self._masters[name] = tensors[name].detach().to("cpu", self._wide[name], copy=True)
        # Not model.to: diffusers' own warns about modules that it would rather keep in float32.
        torch.nn.Module.to(self.model, **how)
        if dtype is not None:
            self.write((name, None) for name in self._masters)
            keep = self._changing.union(lossy)
            self._masters = {name: value for name, value in self._masters.items() if name in keep}

    def hash(self, header: str) -> str:
        """A hash of theta_0 in the dtype it came in or float32; the resident dtype does not matter."""
        tensors = named_tensors(self.model)

        def base_value(name: str) -> torch.Tensor:
            if name in self._masters:
                return self._masters[name]
            return tensors[name].detach().to("cpu", self._wide[name])

        return hash_tensors(((name, base_value(name)) for name in sorted(self._names)), header=header)

    def _write(self, tensors: dict[str, torch.Tensor], name: str, part: Part | None) -> None:
        master = self._masters[name]
        # Names that shared memory when the model came may have been separated by a cast.
        targets = {_memory(tensors[alias]): tensors[alias] for alias in self._names[name]}
        for target in targets.values():
            value = master
            if part is not None:
                value = part.added_to(master, wide(master.dtype, part.dtype, target.dtype))
            target.copy_(value.to(target.dtype))

    def _loses(self, name: str, dtype: torch.dtype) -> bool:
        stored = self._stored[name]
        return stored.is_floating_point and torch.promote_types(stored, dtype) != dtype


def _memory(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that are one and the same memory seen the same way."""
    if tensor.numel() == 0 or tensor.is_meta:
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _host_value(name: str, tensor: torch.Tensor, origin: str) -> torch.Tensor:
    if tensor.is_meta or tensor.dtype not in FLOATING + INTEGER:
        found = "a tensor without values (meta)" if tensor.is_meta else str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{origin}: key {name!r} must be a floating or integer tensor, found {found}")
    value = tensor.detach().to("cpu", wide(tensor.dtype) if tensor.is_floating_point() else tensor.dtype)
    try:
        check_finite(value)
    except KeyProblem as problem:
        raise CheckpointError(f"{origin}: key {name!r} {problem}") from None
    return value
