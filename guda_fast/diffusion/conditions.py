"""What queries are conditioned on: prompts, classes and the like, each distinct one once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from guda_fast._validate import check_index_range, check_tensor, describe

Given = Tensor | Mapping[str, Tensor]
_WHERE = "Conditions"


@dataclass(frozen=True, eq=False)
class Conditions:
    """Distinct conditions, and which one each query has; without tensors, those of an unconditional model.

    tensors: what the network takes by name, such as ``encoder_hidden_states`` or ``class_labels``; a mapping for
        ``added_cond_kwargs`` and the like [(U, ...) each: all U conditions have the same number of tokens]
    row: which condition each query has [(N,), int64, on the CPU, 0..U-1]
    keys: what stands for each condition in query ids: its prompt, class label, or a digest of its tensors [U, distinct;
        None to let ``attribute`` make digests]
    source: what the tensors were made by and of, as JSON values, for the record [a digest of them by default]

    Floating tensors are cast to the dtype of a run's forwards; integers, as of ``class_labels`` or SDXL's
    ``time_ids``, and booleans stay as they are. Raises TypeError or ValueError naming the argument.

    >>> labels = Conditions({"class_labels": torch.tensor([3, 8])}, row=torch.tensor([0, 1, 1]))
    >>> len(labels), labels.count
    (3, 2)
    """

    tensors: Mapping[str, Given]
    row: Tensor
    keys: tuple[str | int | bytes, ...] | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_tensor(_WHERE, "row", self.row, shape=(None,), dtypes=(torch.int64,), device=torch.device("cpu"))
        found = flat(self.tensors)
        for name, tensor in found.items():
            check_tensor(_WHERE, name, tensor, min_dim=1)
            if len(tensor) != self.count:
                raise ValueError(f"{_WHERE}: {name} must have {self.count} rows as the others, got {describe(tensor)}")
        check_index_range(_WHERE, "row", self.row, self.count - 1)
        if self.keys is not None and not len(self.keys) == len(set(self.keys)) == self.count:
            raise ValueError(f"{_WHERE}: keys must be {self.count} distinct ones, got {describe(self.keys)}")

    @classmethod
    def none(cls, queries: int) -> Conditions:
        """Those of as many queries of an unconditional model."""
        return cls({}, torch.zeros(queries, dtype=torch.int64))

    @property
    def count(self) -> int:
        """How many distinct conditions there are: U, and 1 without tensors."""
        return next((len(tensor) for tensor in flat(self.tensors).values() if tensor.dim()), 1)

    @property
    def bytes_a_row(self) -> int:
        """The memory of one condition's tensors."""
        return sum(tensor.nbytes for tensor in flat(self.tensors).values()) // max(1, self.count)

    def __len__(self) -> int:
        """How many queries there are: N."""
        return len(self.row)

    def __getitem__(self, queries: slice | Tensor) -> Conditions:
        """The conditions of some of the queries, and no others."""
        used, row = self.row[queries].unique(return_inverse=True)
        if not self.tensors:
            return replace(self, row=row)
        keys = None if self.keys is None else tuple(self.keys[number] for number in used.tolist())
        tensors = map_tensors(lambda tensor: tensor[used.to(tensor.device)], self.tensors)
        return replace(self, tensors=tensors, row=row, keys=keys)

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditions:
        """The tensors on a device, floating ones in a dtype; ``row`` stays on the host."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype)

        return replace(self, tensors=map_tensors(moved, self.tensors))

    def take(self, rows: Tensor) -> dict[str, Any]:
        """The tensors of a forward's rows, as arguments by name.

        rows: which conditions [(B,), int64, on the device of the tensors]
        """
        return map_tensors(lambda tensor: tensor[rows], self.tensors)

    def digests(self) -> tuple[bytes, ...]:
        """Of each condition, a hash over its names, types, sizes and bytes (kernels/NOISE.md)."""
        found = [hashlib.blake2b() for _ in range(self.count)]
        for name, tensor in sorted(flat(self.tensors).items()):
            values = tensor.detach().cpu().contiguous()
            sizes = ",".join(map(str, values.shape[1:]))
            header = f"{name} {str(values.dtype).removeprefix('torch.')} {sizes} ".encode()
            rows = values.reshape(len(values), -1).view(torch.uint8).numpy()
            for digest, row in zip(found, rows, strict=True):
                digest.update(header)
                digest.update(row.tobytes())
        return tuple(digest.digest() for digest in found)


def flat(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors, those in mappings under names such as ``added_cond_kwargs.text_embeds``."""

    def leaves(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from leaves(f"{prefix}{name}.", value)
            else:
                yield f"{prefix}{name}", value

    return dict(leaves("", tensors))


def map_tensors(change: Callable[[Tensor], Tensor], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same mapping with each tensor changed."""
    return {
        name: map_tensors(change, value) if isinstance(value, Mapping) else change(value)
        for name, value in tensors.items()
    }
