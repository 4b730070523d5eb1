"""What one counterfactual changes: per parameter nothing, or a dense difference."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

HASH_BYTES = 16


@dataclass(frozen=True, eq=False)
class Dense:
    """The difference of one parameter, element for element.

    value: theta_k - theta_0 [the parameter's shape, float32 or float64, on the CPU]
    """

    value: torch.Tensor

    def added_to(self, base: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """theta_0 + delta, formed in ``dtype``."""
        return base.to(dtype) + self.value.to(dtype)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that define the difference, by role."""
        yield "dense", self.value

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the difference was formed."""
        return self.value.dtype


@dataclass(frozen=True, eq=False)
class Delta:
    """theta_k - theta_0 of one group.

    parts: the changed parameters and buffers by name; one that is absent equals the base bit for bit
    origin: the file or object that the counterfactual came from
    """

    parts: Mapping[str, Dense]
    origin: str

    @cached_property
    def hash(self) -> str:
        """BLAKE2b over names, roles, types, shapes and bytes of all parts, in the order of the names."""
        return hash_tensors(
            (f"{name}\0{role}", tensor) for name in sorted(self.parts) for role, tensor in self.parts[name].tensors()
        )

    @property
    def bytes(self) -> int:
        """The memory that the parts take."""
        return sum(tensor.nbytes for part in self.parts.values() for _, tensor in part.tensors())


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]], *, header: str = "") -> str:
    """A hexadecimal hash of CPU tensors in the order given, with their names, types and shapes."""
    digest = hashlib.blake2b(header.encode(), digest_size=HASH_BYTES)
    for name, tensor in tensors:
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        # Flattened, because a tensor without dimensions cannot be viewed as bytes.
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
