"""Query ids: 64 bits of a hash over a query as it was given (kernels/NOISE.md)."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from guda_fast._validate import describe

NOISE_CONTRACT = 1
"""Version of the noise contract; results and caches of different versions never mix."""


def query_id(content: np.ndarray[Any, Any], condition: str | int | bytes | None = None) -> int:
    """The id of a query: the first 8 bytes, little endian, of a BLAKE2b digest.

    Hashed bytes: the kind (``image`` or ``tensor``), the number of dimensions and the sizes as little-endian
    int64, the uint8 pixels or little-endian float32 values in C order, then the condition with its tag
    (``none``; ``prompt`` and UTF-8; ``label`` and decimal digits; ``values`` and a digest). Nothing that a device
    computed goes in, so that the noise of a query is the same everywhere.

    content: decoded pixels [(H, W) or (H, W, 3), uint8] or values [any shape, float32].
    condition: None, a prompt, a class label, or the digest of tensors that were given in their place.

    Returns the id [0..2^64-1]. Raises TypeError for other dtypes and conditions.

    >>> hex(query_id(np.zeros((2, 2), dtype=np.uint8)))
    '0x5fdd053296d172fa'
    """
    if content.dtype == np.uint8:
        kind = b"image"
    elif content.dtype == np.float32:
        kind = b"tensor"
    else:
        raise TypeError(f"query_id: content must be uint8 pixels or float32 values, got {content.dtype}")
    digest = hashlib.blake2b(kind)
    digest.update(np.array([content.ndim, *content.shape], dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(content, dtype=content.dtype.newbyteorder("<")).tobytes())
    digest.update(_condition_bytes(condition))
    return int.from_bytes(digest.digest()[:8], "little")


def _condition_bytes(condition: str | int | bytes | None) -> bytes:
    if condition is None:
        return b"none"
    if isinstance(condition, str):
        return b"prompt" + condition.encode("utf-8")
    if isinstance(condition, bytes):
        return b"values" + condition
    if isinstance(condition, int | np.integer) and not isinstance(condition, bool):
        return b"label" + str(int(condition)).encode("ascii")
    raise TypeError(f"query_id: condition must be None, a prompt, a class label or a digest, got {describe(condition)}")
