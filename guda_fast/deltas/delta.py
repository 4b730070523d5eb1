"""What one counterfactual changes: per parameter nothing, a dense difference, or a low-rank one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

HASH_BYTES = 16


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor.to(dtype)``, which alone takes longer than adding a bias."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


@dataclass(frozen=True, eq=False)
class Dense:
    """The difference of one parameter, element for element.

    value: theta_k - theta_0 [the parameter's shape, float32 or float64, on the CPU]
    """

    value: torch.Tensor

    def added_to(self, base: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """theta_0 + delta, formed in ``dtype``; in ``out`` if that is given, which must have this dtype."""
        return torch.add(cast(base, dtype), cast(self.value, dtype), out=out)

    def full(self, shape: torch.Size) -> torch.Tensor:
        """The difference, element for element."""
        return self.value

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that define the difference, by role."""
        yield "dense", self.value

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the difference was formed."""
        return self.value.dtype


@dataclass(frozen=True, eq=False)
class LowRank:
    """The difference of one weight as a product of two factors: delta = up down, of rank r at most.

    up: the output factor [(O, r), float32 or float64, on the CPU]. A scale (LoRA's alpha / r) is multiplied in
    down: the input factor [(r, *I), up's dtype, on the CPU], where the weight is (O, *I)
    Source: Hu et al. 2021 (LoRA), equation 3
    """

    up: torch.Tensor
    down: torch.Tensor

    def added_to(self, base: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """theta_0 + delta, formed in ``dtype``; in ``out`` if that is given, which must have this dtype."""
        product = cast(self.up, dtype) @ cast(self.down, dtype).flatten(1)
        return torch.add(cast(base, dtype), product.view(base.shape), out=out)

    def full(self, shape: torch.Size) -> torch.Tensor:
        """The difference, element for element."""
        return (self.up @ self.down.flatten(1)).view(shape)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that define the difference, by role."""
        yield "up", self.up
        yield "down", self.down

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the factors."""
        return self.up.dtype

    @property
    def rank(self) -> int:
        """The number of columns of ``up``."""
        return self.up.shape[1]


Part = Dense | LowRank


@dataclass(frozen=True, eq=False)
class Delta:
    """theta_k - theta_0 of one group; a counterfactual that ``DeltaBank.load`` takes as it is.

    parts: the changed parameters and buffers by name; one that is absent equals the base bit for bit
    origin: the file or object that the counterfactual came from

    >>> Delta({"conv_in.weight": LowRank(torch.zeros(32, 4), torch.zeros(4, 3, 3, 3))}, "adapter").bytes
    944
    """

    parts: Mapping[str, Part]
    origin: str = "delta"

    @cached_property
    def hash(self) -> str:
        """BLAKE2b over names, roles, types, shapes and bytes of all parts, in the order of the names."""
        digest = TensorHash()
        for name in sorted(self.parts):
            digest.add_part(name, self.parts[name])
        return digest.hex()

    @property
    def bytes(self) -> int:
        """The memory that the parts take."""
        return sum(part_bytes(part) for part in self.parts.values())


class LazyParts(Mapping[str, Part]):
    """Parts that are read whenever they are asked for; none is kept, so that walking through them needs memory for one.

    support: gives the names. read: gives the part of a name
    """

    def __init__(self, support: Callable[[], Collection[str]], read: Callable[[str], Part]) -> None:
        self._support, self._read = support, read

    def __getitem__(self, name: str) -> Part:
        if name not in self._support():
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._support())

    def __len__(self) -> int:
        return len(self._support())


def part_bytes(part: Part) -> int:
    """The memory that a part takes."""
    return sum(tensor.nbytes for _, tensor in part.tensors())


class TensorHash:
    """A hash of tensors in the order in which they are added, with their names, types and shapes."""

    def __init__(self, header: str = "") -> None:
        self._digest = hashlib.blake2b(header.encode(), digest_size=HASH_BYTES)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor on the CPU."""
        self._digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        # Flattened, because a tensor without dimensions cannot be viewed as bytes.
        self._digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def add_part(self, name: str, part: Part) -> None:
        """Add the tensors of a part."""
        for role, tensor in part.tensors():
            self.add(f"{name}\0{role}", tensor)

    def hex(self) -> str:
        """The hash of all so far, in hexadecimal digits."""
        return self._digest.hexdigest()
