"""How much memory can be had, and what becomes of it when it is freed."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let this process keep the memory that a forward frees for the next one, where it runs on the CPU.

    The C library of Linux gives freed activations back to the system, and takes them from it again page by page:
    8 % of the time of a small UNet at 32x32, nothing at 8x8 (docs/engine.md). Afterwards the process stays at the
    most that it needed. The commands of guda_fast do this for themselves; a process of yours is left alone unless it
    asks.

    Returns whether it is so: not with another C library or allocator, nor where the environment has settings of its
    own (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``, ``LD_PRELOAD``).

    >>> gf.keep_freed_memory()  # doctest: +SKIP
    True
    """
    if any(name in os.environ for name in _SET_BY_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # The larger threshold is refused by older versions.
    most = any(mallopt(_MMAP_THRESHOLD, size) for size in (2**30, 2**25))
    return bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1)) and most


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had, None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
