"""Noise from elsewhere than the contract: a tensor of the caller's, or torch generators seeded batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from guda_fast._validate import check_index_range, check_int, check_tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NoiseSource(Protocol):
    """Noise for the rows of a run instead of the contract's; it is made and held outside of the ops."""

    def noise(self, query: Tensor, draw: Tensor) -> Tensor:
        """The noise of rows [(B, C, H, W), float32, on the device of the run].

        query: which of the queries [(B,), int64, 0..N-1, on that device]
        draw: which of the protocol's draws, in its order [(B,), int64, 0..D-1, on that device]
        """
        ...


class GivenNoise:
    """Noise that is all in memory.

    values: of every query at every draw, in the protocol's order (timesteps rising, samples innermost)
        [(N, D, C, H, W), float32, bfloat16 or float16, any strides; on the device of the run]

    Raises TypeError or ValueError naming the argument.

    >>> source = GivenNoise(torch.arange(12.0).reshape(2, 3, 1, 1, 2))
    >>> source.noise(torch.tensor([1]), torch.tensor([2])).flatten().tolist()
    [10.0, 11.0]
    """

    def __init__(self, values: Tensor) -> None:
        self.values = check_tensor("GivenNoise", "values", values, min_dim=3, dtypes=_DTYPES)

    def noise(self, query: Tensor, draw: Tensor) -> Tensor:
        """See `NoiseSource`."""
        for name, index, count in zip(("query", "draw"), (query, draw), self.values.shape, strict=False):
            check_index_range("GivenNoise", name, index, count - 1)
        return self.values[query, draw].float()


class SeededNoise:
    """Noise of a torch generator that is seeded anew for every batch of queries.

    Batch b draws one ``randn`` of shape (its queries, *shape) for each draw of ``order``, in that order, from a
    generator seeded with ``seeds[b]``. Nothing is kept but the last of these: rows that come batch by batch, in the
    generator's order, cost one ``randn`` each time, others as many as lie before them.

    seeds: one a batch [0..2^64-1]. sizes: queries of each batch, which follow each other [>= 1].
    order: the draws in the order in which the generator makes them [a permutation of 0..D-1].
    shape: of one query (C, H, W). device: of the run; generators of other devices give other numbers.

    Raises TypeError or ValueError naming the argument.

    >>> source = SeededNoise([7], [2], order=[1, 0], shape=(1, 1, 3), device="cpu")
    >>> later = torch.randn(2, 1, 1, 3, generator=torch.Generator().manual_seed(7))
    >>> torch.equal(source.noise(torch.tensor([0, 1]), torch.tensor([1, 1])), later)
    True
    """

    def __init__(
        self,
        seeds: Sequence[int],
        sizes: Sequence[int],
        *,
        order: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str,
    ) -> None:
        if len(seeds) != len(sizes):
            raise ValueError(f"SeededNoise: sizes must hold one size a seed ({len(seeds)}), got {len(sizes)}")
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"SeededNoise: order must be a permutation of 0..{len(order) - 1}, got {list(order)[:8]}")
        self._seeds = [check_int("SeededNoise", "seeds", seed, 0, 2**64 - 1) for seed in seeds]
        self._sizes = [check_int("SeededNoise", "sizes", size, 1) for size in sizes]
        self._shape, self._device = tuple(shape), torch.device(device)
        # On the host, where the rows are grouped.
        self._ends = torch.tensor([*accumulate(self._sizes)], dtype=torch.int64)
        self._step = torch.tensor(order, dtype=torch.int64).argsort()
        self._generator = torch.Generator(self._device)
        self._batch, self._made = -1, 0
        self._last = torch.empty(0)

    def noise(self, query: Tensor, draw: Tensor) -> Tensor:
        """See `NoiseSource`."""
        query, draw = query.cpu().contiguous(), draw.cpu()
        check_index_range("SeededNoise", "query", query, int(self._ends[-1]) - 1)
        check_index_range("SeededNoise", "draw", draw, len(self._step) - 1)
        batch, step = torch.searchsorted(self._ends, query, right=True), self._step[draw]
        out = torch.empty((len(query), *self._shape), device=self._device)
        position = batch * len(self._step) + step
        # Each randn is made once for all its rows, and they come in the generator's order.
        for place in position.unique().tolist():
            rows = (position == place).nonzero().flatten()
            number, steps = divmod(place, len(self._step))
            first = int(self._ends[number]) - self._sizes[number]
            out[rows.to(self._device)] = self._randn(number, steps)[(query[rows] - first).to(self._device)]
        return out

    def _randn(self, batch: int, step: int) -> Tensor:
        """What the generator of a batch gives at a step."""
        if batch != self._batch or step < self._made - 1:
            self._generator.manual_seed(self._seeds[batch])
            self._batch, self._made = batch, 0
        while self._made <= step:
            size = (self._sizes[batch], *self._shape)
            self._last = torch.randn(size, generator=self._generator, device=self._device)
            self._made += 1
        return self._last
