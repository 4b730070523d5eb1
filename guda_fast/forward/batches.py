"""Rows in forwards of bounded size: padding of the last one, and what to do when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Advance = Callable[[int], None]
"""Called with the number of rows just done; raises to stop."""

# Sizes below the full one are multiples of its eighth, or powers of two: few enough that kernels, graphs and
# compiled code are made for each once, close enough that padding costs an eighth at most from there on.
_STEPS = 8


class Batches:
    """The size of a forward, which halves when memory runs out and stays so.

    size: rows a forward [>= 1].

    >>> batches = Batches(64)
    >>> [batches.padded(rows) for rows in (1, 3, 9, 50, 64)]
    [1, 4, 16, 56, 64]
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def padded(self, rows: int) -> int:
        """The size of the forward that ``rows`` are run in [rows <= size]."""
        step = max(1, self.size // _STEPS)
        if rows <= step:
            return min(self.size, 1 << (rows - 1).bit_length())
        return min(self.size, -(-rows // step) * step)

    def sizes(self, rows: int) -> Iterator[int]:
        """The sizes of the forwards that ``rows`` take."""
        yield from [self.size] * (rows // self.size)
        if rows % self.size:
            yield self.padded(rows % self.size)

    def run(
        self,
        index: Tensor,
        forward: Callable[[Tensor], Tensor],
        advance: Advance,
        free: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Results of ``forward`` for the rows of ``index`` in their order [(len(index),), on its device].

        forward: takes the indices of one padded batch, whose last ones may repeat the first, gives one result each
        advance: called with the rows of each batch that is done
        free: called before a batch that did not fit is tried again at half the size
        """
        results: list[Tensor] = []
        done = 0
        while done < len(index):
            rows = index[done : done + self.size]
            padding = self.padded(len(rows)) - len(rows)
            try:
                result = forward(torch.cat([rows, rows[:1].expand(padding)]) if padding else rows)
            except RuntimeError as error:
                if self.size == 1 or not is_out_of_memory(error):
                    raise
                self.size = -(-self.size // 2)
                free()
                continue
            results.append(result[: len(rows)])
            done += len(rows)
            advance(len(rows))
        return torch.cat(results) if results else torch.empty(0, dtype=torch.float64)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on a GPU or on the host, where torch has no class of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
