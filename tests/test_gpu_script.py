"""benchmarks/gpu.sh without a GPU: its dry run, and what it does when a step fails."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import runner
from benchmarks.registry import benchmarks

ROOT = Path(__file__).resolve().parent.parent
ON_GPU = [name for name, benchmark in benchmarks().items() if benchmark.device == "cuda"]

pytestmark = pytest.mark.skipif(
    shutil.which("timeout") is None, reason="gpu.sh limits its steps with coreutils' timeout"
)


def run(out: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OUT": str(out), "PYTHON": python}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def steps(out: Path) -> dict[str, str]:
    lines = (out / "steps.tsv").read_text().splitlines()
    return {name: outcome for name, outcome, _ in (line.split("\t") for line in lines)}


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    """Every GPU benchmark through the interpreter, so that no typo waits for the GPU."""
    pytest.importorskip("triton")
    done = run(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(steps(tmp_path).values()) == {"ok"}
    for name in ON_GPU:
        rows = runner.read_csv(tmp_path / f"{name}.csv")
        wanted = "tuned compiled" if name == "gpu_ladder" else "triton"
        assert wanted in {row["backend"] for row in rows}, name
        assert name in (tmp_path / "summary.md").read_text() or name == "gpu_ceilings"
    assert "right delta_conv2d triton" in (tmp_path / "log.txt").read_text()
    # What may be fetched from where the script ran.
    assert len(list(tmp_path.iterdir())) <= 8


@pytest.mark.slow
def test_a_failing_step_stops_no_other(tmp_path: Path) -> None:
    """A Python that fails where asked to measure: that step is FAILED, the summary is written, the status is 1."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *benchmarks\\ run*) exit 3 ;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    out = tmp_path / "out"
    done = run(out, "--dry-run", "build", "ceilings", "noise", python=str(python))
    assert done.returncode == 1, done.stdout + done.stderr
    assert steps(out) == {"build": "ok", "ceilings": "FAILED", "noise": "FAILED"}
    assert "| noise | FAILED |" in (out / "summary.md").read_text()


def test_unknown_step(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "everything")
    assert done.returncode == 2
    assert "steps are build tests" in done.stderr
    assert not (tmp_path / "out").exists()
