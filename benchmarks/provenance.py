"""Where and with what a row was measured."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from guda_fast._files import atomic_write

ROOT = Path(__file__).resolve().parent.parent


def last_level_cache_bytes(device: str = "cpu") -> int:
    """The size of core 0's largest cache, or 32 MiB where the system does not say; of a GPU its L2 cache."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties().L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = [text.read_text().strip() for text in sizes]
    return max((int(size[:-1]) * units[size[-1]] for size in found), default=32 * 2**20)


def rotating_sets(bytes_per_set: int, quick: bool, device: str = "cpu") -> int:
    """How many input sets to rotate, so that those between two uses of one are twice the last-level cache."""
    return 2 if quick else 2 + 2 * last_level_cache_bytes(device) // bytes_per_set


def device_name(device: str = "cpu") -> str:
    """The processor's or the GPU's model name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the checkout, with ``+`` where tracked files differ from it.

    Where the tree has no git, what the environment variable GUDA_FAST_COMMIT says, or nothing.
    """
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return os.environ.get("GUDA_FAST_COMMIT", "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def provenance(device: str = "cpu") -> dict[str, str]:
    """The columns that all rows of a run share."""
    return {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "",
        "guda_fast": _version("guda_fast"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows that have the same columns, or leave what was there."""
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
