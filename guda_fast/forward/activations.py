"""How much memory a forward takes at its peak, beside what was there before it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that tensors made by ``call`` hold at one time, scratch memory inside operations left out.

    >>> peak_bytes(lambda: torch.zeros(1024).add(1).mul(2).sum())
    8192
    """
    with _Live() as live:
        call()
    peak: int = live.peak
    return peak


class _Live(TorchDispatchMode):
    """Follows each storage from the operation that returns it first to its end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What an operation is given and returns again, such as its out=, it did not make.
        given = {_storage(t) for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in given:
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._known or size == 0:
            return
        self._known[key] = size
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._end, key)

    def _end(self, key: int) -> None:
        self._now -= self._known.pop(key)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
