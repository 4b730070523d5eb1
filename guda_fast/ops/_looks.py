"""What is remembered of calls that look alike, so that small ops need not be checked and prepared again and again."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_MOST = 4096
_PLAIN = (Tensor, torch.nn.Parameter)  # others may have no memory of their own


def looks(*values: Any) -> Hashable | None:
    """Equal for tensors that validation and the choice of a backend cannot tell apart: all but memory and contents.

    None where a value is neither None nor a plain tensor: what others are cannot be seen, and must be asked each time.
    """
    found: list[Hashable] = []
    for value in values:
        if value is None:
            found.append(None)
        elif type(value) in _PLAIN and value.layout is torch.strided:
            found.append((value.shape, value.stride(), value.dtype, value.device, value.is_neg()))
        else:
            return None
    return tuple(found)


class Remembered(Generic[T]):
    """What was prepared for a call, by its looks; forgets everything when there is too much."""

    def __init__(self) -> None:
        self._found: dict[Hashable, T] = {}
        self.get = self._found.get

    def keep(self, key: Hashable, prepared: T) -> None:
        """Remember what was prepared for a call that went well."""
        if len(self._found) >= _MOST:
            self._found.clear()
        self._found[key] = prepared
