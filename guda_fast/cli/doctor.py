"""`guda-fast doctor`: what this installation and this machine can run."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata

import typer

# Core dependencies, then what extras bring.
_PACKAGES = ("torch", "numpy", "diffusers", "safetensors", "pyarrow", "pillow", "tqdm", "typer")
_EXTRAS = ("triton", "scikit-learn", "matplotlib", "pandas")


def doctor() -> None:
    """Print versions, devices, backends with the reasons against them, instruction sets, OpenMP and CUDA."""
    sections = {
        "Versions": _versions(),
        "Devices": _devices(),
        "Backends": _backends(),
        "Native extension": _native(),
        "CUDA": _cuda(),
    }
    for title, lines in sections.items():
        typer.echo(title)
        for line in lines:
            typer.echo(f"  {line}")


def _versions() -> Iterator[str]:
    from guda_fast._version import __version__

    yield f"guda_fast {__version__}, Python {platform.python_version()} on {platform.platform()}"
    yield ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    yield "optional: " + ", ".join(f"{name} {_version(name)}" for name in _EXTRAS)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[str]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"cpu: {cores} cores, torch uses {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.cuda.device_count() == 0:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        yield f"cuda: none (torch is built with {built})"


def _backends() -> Iterator[str]:
    # Importing the ops fills the table of backends.
    import guda_fast.ops  # noqa: F401
    from guda_fast._backends import availability

    for row in availability():
        device = "other devices" if row.device == "*" else row.device
        state = f"unavailable: {row.reason}" if row.reason else "available"
        yield f"{row.op} on {device}: {row.backend}, {state}{f' ({row.detail})' if row.detail else ''}"


def _native() -> Iterator[str]:
    from guda_fast._backends import native, native_unavailable
    from guda_fast.build_config import build_config

    extension, config = native(), build_config()
    if extension is None:
        yield str(native_unavailable())
        return
    yield f"compiler {config['compiler']}, OpenMP {'yes' if config['openmp'] else 'no'}"
    built, runs = config["instruction_sets"], extension.instruction_sets()
    assert isinstance(built, list)
    yield f"instruction sets built: {', '.join(built)}; this processor runs: {', '.join(runs)}"
    yield f"in use: {extension.instruction_set()}"
    yield f"source hash {config['source_hash']}"


def _cuda() -> Iterator[str]:
    from guda_fast._backends import native

    yield _nvcc()
    extension = native()
    if extension is None:
        return
    status = extension.cuda_status()
    if not status["compiled"]:
        yield "the extension is built without CUDA sources (GUDA_FAST_CUDA)"
        return
    yield f"the extension is built with runtime {_cuda_version(status['runtime_version'])}"
    if status["error"]:
        yield f"no device: {status['error']}"
    else:
        driver = _cuda_version(status["driver_version"])
        yield f"{status['device_count']} devices, the driver serves runtimes up to {driver}"


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "nvcc: not on PATH"
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    release = next((line for line in done.stdout.splitlines() if "release" in line), "unknown release")
    return f"nvcc: {release.strip()}"
