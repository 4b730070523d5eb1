"""The package as it is imported from anywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from guda_fast import _C

ROOT = Path(__file__).resolve().parent.parent


def run_elsewhere(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime(tmp_path: Path) -> None:
    """Two copies of libgomp would each start their own threads."""
    code = (
        "import guda_fast, guda_fast._C\n"
        "paths = {line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}\n"
        "print(len(paths), *sorted(paths))"
    )
    count, *paths = run_elsewhere(code, tmp_path).split()
    assert count == "1", paths


def test_import_is_light(tmp_path: Path) -> None:
    code = (
        "import sys, guda_fast\n"
        "print(*(name for name in ('diffusers', 'transformers', 'matplotlib', 'sklearn', 'scipy', 'pandas', "
        "'pyarrow') if name in sys.modules))"
    )
    assert run_elsewhere(code, tmp_path).split() == []


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm lists the exported symbols")
def test_extension_exports_one_symbol() -> None:
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[-1] for line in listing.splitlines()] == ["PyInit__C"]


def test_kernels_are_installed(tmp_path: Path) -> None:
    code = (
        "from importlib.resources import files\n"
        "import guda_fast.kernels\n"
        "print(files('guda_fast.kernels').joinpath('NOISE.md').read_text()[:30])"
    )
    assert "noise contract" in run_elsewhere(code, tmp_path)


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in project["project"]["optional-dependencies"].values():
        requirements += extra
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    wanted = {name.partition(">=")[0].lower().replace("_", "-") for name in requirements if "[" not in name}
    # Each CUDA build of torch requires one version of triton: a pin of ours would refuse all the others.
    assert wanted - pinned == {"triton"}
    assert "torch==2.13.0" in lines
