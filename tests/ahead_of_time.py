"""Runs a script that compiles Triton kernels for a CUDA target without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def compiled(script: str, capability: int, cache: Path) -> list[str]:
    """The lines that tests/<script> prints, in a process of its own: the interpreter is chosen for a whole one."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, Path(__file__).parent / script, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
