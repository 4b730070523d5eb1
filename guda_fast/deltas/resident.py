"""The one model that runs: its tensors are overwritten in place, and the base can always be had back."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch

from guda_fast.deltas.delta import Dense, Part, TensorHash, cast
from guda_fast.deltas.diff import FLOATING, INTEGER, BaseTensor, KeyProblem, check_finite, wide
from guda_fast.deltas.weights import named_tensors
from guda_fast.errors import CheckpointError

_Place = tuple[dict[str, Any], str]


def base_tensors(model: torch.nn.Module) -> list[BaseTensor]:
    """What there is of parameters and buffers in ``model``, shared ones once."""
    tensors = named_tensors(model)
    persistent = model.state_dict(keep_vars=True).keys()
    names: dict[Hashable, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(_memory(tensor), []).append(name)
    found = []
    for shared in names.values():
        tensor = tensors[shared[0]]
        dtype = wide(tensor.dtype) if tensor.is_floating_point() else tensor.dtype
        found.append(BaseTensor(tuple(shared), tuple(tensor.shape), dtype, persistent.isdisjoint(shared)))
    return found


class ResidentModel:
    """A model whose tensors are written in place, and exact copies of what that loses.

    Methods that write or keep something are called without gradients and outside of inference mode.

    theta_0 of a tensor is kept on the host (its master) from the first time that the tensor is overwritten, or as long
    as the resident dtype is too narrow for it, or the model is on another device. Masters have the dtype that the base
    came in and the memory layout of the resident tensor.

    model: the model, which this object owns; it is put into eval mode and takes no gradients
    origin: what an error calls the base
    Raises: CheckpointError for a tensor without finite values, or of a dtype that has no delta
    """

    def __init__(self, model: torch.nn.Module, origin: str) -> None:
        self.model = model.eval().requires_grad_(False)
        tensors = named_tensors(model)
        for name, tensor in tensors.items():
            _check_usable(name, tensor, origin)
        self.tensors = base_tensors(model)
        self._stored = {tensor.name: tensors[tensor.name].dtype for tensor in self.tensors}
        self._wide = {tensor.name: tensor.dtype for tensor in self.tensors}
        self._masters: dict[str, torch.Tensor] = {}
        self._places = self._find_places()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((self._resident(name).device for name in self._places), torch.device("cpu"))

    def theta_0(self, name: str) -> torch.Tensor:
        """The base's value on the CPU, in float32 or wider (integers as they are); it may share the model's memory."""
        value = self._masters.get(name)
        if value is None:
            value = self._resident(name).detach().to("cpu")
        return cast(value, self._wide[name])

    def keep(self, names: Iterable[str]) -> None:
        """Keep theta_0 of tensors that will be overwritten; all at once, lest temporary memory leaves gaps between."""
        for name in names:
            self._master(name)

    def value(self, name: str, part: Part, out: torch.Tensor | None = None) -> torch.Tensor:
        """theta_0 + part, formed in the widest of the dtypes that meet and rounded once to the resident one.

        out: where to [a CPU tensor of the resident tensor's shape and dtype]
        Returns: the value on the CPU, in ``out`` or not rounded yet
        """
        base, target = self._master(name), self._resident(name)
        dtype = wide(base.dtype, part.dtype, target.dtype)
        if out is None or out.dtype == dtype:
            return part.added_to(base, dtype, out)
        return out.copy_(part.added_to(base, dtype))

    def write(self, name: str, part: Part) -> None:
        """Write theta_0 + part into the resident tensor."""
        target = self._resident(name)
        self.put(name, self.value(name, part, target if target.device.type == "cpu" else None))

    def put(self, name: str, value: torch.Tensor) -> None:
        """Copy a value into the resident tensor; on a CUDA device, behind the work on the current stream."""
        for parameters, key in self._places[name]:
            target = parameters[key]
            if target is not value:
                target.copy_(value, non_blocking=target.is_cuda)

    def restore(self, name: str) -> None:
        """Write theta_0 into the resident tensor."""
        if name in self._masters:
            self.put(name, self._masters[name])

    def staging(self, name: str) -> torch.Tensor:
        """New memory on the host from which a value is copied into the resident tensor as it lies."""
        return _host_like(self._resident(name), self._resident(name).dtype)

    def laid_out(self, name: str, part: Part) -> Part:
        """The part with a dense difference in the memory layout of the resident tensor, where adding it is fast."""
        target = self._resident(name)
        if not isinstance(part, Dense) or part.value.stride() == target.stride():
            return part
        return Dense(torch.empty_like(target, dtype=part.dtype, device="cpu").copy_(part.value))

    def move(self, **how: Any) -> None:
        """``model.to(**how)``; must hold the base. What a narrower dtype would lose is kept on the host."""
        dtype: torch.dtype | None = how.get("dtype")
        for name in self._stored:
            if dtype is not None and self._loses(name, dtype):
                self._master(name)
        # Not model.to: diffusers' own warns about modules that it would rather keep in float32.
        torch.nn.Module.to(self.model, **how)
        self._places = self._find_places()
        if dtype is not None:
            for name in self._masters:
                self.restore(name)
        on_host = self.device.type == "cpu"
        for name in self._stored:
            value = self._masters.pop(name, None)
            target = self._resident(name)
            if target.is_floating_point() and (not on_host or self._loses(name, target.dtype)):
                self._masters[name] = self._hosted(name, target if value is None else value)

    def hash(self, header: str) -> str:
        """A hash of theta_0 in the dtype it came in or float32; the resident dtype does not matter."""
        digest = TensorHash(header)
        for name in sorted(self._stored):
            digest.add(name, self.theta_0(name))
        return digest.hex()

    def _resident(self, name: str) -> torch.Tensor:
        parameters, key = self._places[name][0]
        tensor: torch.Tensor = parameters[key]
        return tensor

    def _master(self, name: str) -> torch.Tensor:
        """theta_0 on the host, kept from here on, because the resident tensor is about to lose it."""
        if name not in self._masters:
            self._masters[name] = self._hosted(name, self._resident(name))
        return self._masters[name]

    def _hosted(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """theta_0 in memory of its own on the host, in the resident layout; ``value`` itself if it is that."""
        target = self._resident(name)
        pinned = value.is_pinned() or not target.is_cuda
        if value is not target and pinned and value.stride() == target.stride():
            return value
        return _host_like(target, self._stored[name]).copy_(value)

    def _loses(self, name: str, dtype: torch.dtype) -> bool:
        stored = self._stored[name]
        return stored.is_floating_point and torch.promote_types(stored, dtype) != dtype

    def _find_places(self) -> dict[str, list[_Place]]:
        """Where the resident tensors of each first name are kept, each memory once.

        The places and not the tensors, which others may replace. Names that shared memory when the model came may
        have been separated by a cast.
        """
        found: dict[str, list[_Place]] = {}
        for tensor in self.tensors:
            places: dict[Hashable, _Place] = {}
            for name in tensor.names:
                owner, _, key = name.rpartition(".")
                module = self.model.get_submodule(owner)
                holder: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
                places.setdefault(_memory(holder[key]), (holder, key))
            found[tensor.name] = list(places.values())
        return found


def _host_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Empty memory on the host in the layout of ``tensor``, pinned where copies to its device are asynchronous then."""
    return torch.empty_like(tensor, dtype=dtype, device="cpu", pin_memory=tensor.is_cuda)


def _memory(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that are one and the same memory seen the same way."""
    if tensor.numel() == 0 or tensor.is_meta:
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _check_usable(name: str, tensor: torch.Tensor, origin: str) -> None:
    if tensor.is_meta or tensor.dtype not in FLOATING + INTEGER:
        found = "a tensor without values (meta)" if tensor.is_meta else str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{origin}: key {name!r} must be a floating or integer tensor, found {found}")
    try:
        check_finite(tensor.detach())
    except KeyProblem as problem:
        raise CheckpointError(f"{origin}: key {name!r} {problem}") from None
