"""How much memory a call needs beyond what its process already holds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

_SELF = Path("/proc/self")


def peak_extra_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """The growth of the high-water mark during a call: of the resident set on the CPU (None where /proc is not
    there), of the allocator's memory on a GPU.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - allocated
    try:
        # Freed blocks that malloc keeps would hide an allocation.
        ctypes.CDLL(None).malloc_trim(0)
        (_SELF / "clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        call()
        return max(_status_bytes("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def _status_bytes(field: str) -> int:
    for line in (_SELF / "status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
