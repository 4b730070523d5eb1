"""Rows in forwards of bounded size: padding of the last one, and what to do when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from guda_fast.forward._routing import Inputs
from guda_fast.forward.noised import NoisedBatch, NoisedQueries

Advance = Callable[[int], None]
"""Called with the number of rows just done; raises to stop."""

Forward = Callable[[Inputs, Tensor], Tensor]
"""Takes rows, and which ones they are; gives the prediction, which the next call may overwrite."""

# Sizes below the full one are multiples of its eighth, or powers of two: few enough that kernels, graphs and
# compiled code are made for each once, close enough that padding costs an eighth at most from there on.
_STEPS = 8
# Noise and errors are made for so many forwards at once: they are little work, but many calls.
_FORWARDS = 8


class Batches:
    """The size of a forward, which halves when memory runs out and stays so.

    size: rows a forward [>= 1]. fixed: every forward has this size, as compiled code wants it, and scores that do not
        depend on their company.

    >>> batches = Batches(64)
    >>> [batches.padded(rows) for rows in (1, 3, 9, 50, 64)]
    [1, 4, 16, 56, 64]
    """

    def __init__(self, size: int, *, fixed: bool = False) -> None:
        self.size = size
        self.fixed = fixed

    def padded(self, rows: int) -> int:
        """The size of the forward that ``rows`` are run in [rows <= size]."""
        if self.fixed:
            return self.size
        step = max(1, self.size // _STEPS)
        if rows <= step:
            return min(self.size, 1 << (rows - 1).bit_length())
        return min(self.size, -(-rows // step) * step)

    def sizes(self, rows: int) -> Iterator[int]:
        """The sizes of the forwards that ``rows`` take."""
        yield from [self.size] * (rows // self.size)
        if rows % self.size:
            yield self.padded(rows % self.size)

    def shrink(self, error: Exception, free: Callable[[], None]) -> None:
        """Halve the size if it was memory that ran out, and free what can be; raise what cannot be helped by that."""
        if self.size == 1 or not is_out_of_memory(error):
            raise error
        self.size = -(-self.size // 2)
        free()

    def errors(
        self,
        queries: NoisedQueries,
        query: Tensor,
        draw: Tensor,
        forward: Forward,
        advance: Advance,
        free: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """w_t e(t) of rows, in their order [(R,), float64, on the CPU]; the host waits for the device at the end only.

        query, draw: the rows [(R,), int64, on the device]
        forward: called with one padded batch after another; the last rows of one may repeat its first
        advance: called with the rows of each batch that is done
        free: called before a batch that did not fit is tried again at half the size
        """
        found, start = [], 0
        while start < len(query):
            block = slice(start, start + _FORWARDS * self.size)
            try:
                batch = queries.batch(query[block], draw[block])
                x_t = batch.x_t()
                prediction = torch.empty_like(x_t)
            except (RuntimeError, MemoryError) as error:
                self.shrink(error, free)
                continue
            self._fill(prediction, batch, x_t, start, forward, advance, free)
            found.append(batch.errors(prediction))
            start += len(x_t)
        return torch.cat(found).cpu()

    def _fill(
        self,
        prediction: Tensor,
        batch: NoisedBatch,
        x_t: Tensor,
        start: int,
        forward: Forward,
        advance: Advance,
        free: Callable[[], None],
    ) -> None:
        """Predict all rows of x_t, which are those from ``start`` on."""
        done = 0
        while done < len(x_t):
            rows = min(self.size, len(x_t) - done)
            part = slice(done, done + rows)
            size = self.padded(rows)
            numbers = _extended(torch.arange(start + done, start + done + rows), size)
            try:
                conditions = batch.conditions(_extended(batch.condition[part], size))
                inputs = Inputs(_extended(x_t[part], size), _extended(batch.time[part], size), conditions)
                out = forward(inputs, numbers)
            except (RuntimeError, MemoryError) as error:
                self.shrink(error, free)
                continue
            # Channels beyond the query's own are a variance.
            prediction[part] = out[:rows, : prediction.shape[1]]
            done += rows
            advance(rows)


def _extended(tensor: Tensor, rows: int) -> Tensor:
    """A tensor with its first row repeated at the end until it has so many."""
    missing = rows - len(tensor)
    return torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])]) if missing else tensor


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU, in one of its libraries, or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in ("can't allocate memory", "_STATUS_ALLOC_FAILED"))
