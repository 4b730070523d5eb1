"""How the native extension was built."""

from __future__ import annotations

import hashlib
from pathlib import Path

from guda_fast._backends import native
from guda_fast._version import __version__

# The same files as CMakeLists.txt hashes.
_HASHED = (
    "csrc/**/*.h",
    "csrc/**/*.cpp",
    "csrc/**/*.cu",
    "csrc/**/*.in",
    "csrc/**/*.map",
    "kernels/**/*.cuh",
    "cmake/*.cmake",
    "CMakeLists.txt",
)


def build_config() -> dict[str, str | bool | list[str]]:
    """How this installation of guda_fast was built.

    Returns: a dict with ``version`` and ``native`` (whether the extension is there), and with it
    ``compiler``, ``flags``, ``instruction_sets`` (those built, best last; what the processor runs is another
    matter), ``openmp``, ``cuda`` (whether the CUDA sources were compiled) and ``source_hash``
    (of csrc, kernels and the CMake files).

    >>> build_config()["native"]
    True
    """
    extension = native()
    if extension is None:
        return {"version": __version__, "native": False}
    return {"native": True, **extension.build_config()}


def source_hash(root: Path) -> str:
    """The hash that an extension built now from the checkout ``root`` would carry as ``source_hash``."""
    paths = sorted({path.relative_to(root).as_posix() for pattern in _HASHED for path in root.glob(pattern)})
    listing = "".join(f"{hashlib.sha256((root / path).read_bytes()).hexdigest()}  {path}\n" for path in paths)
    return hashlib.sha256(listing.encode()).hexdigest()
