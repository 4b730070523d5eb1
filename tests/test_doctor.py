"""`guda-fast doctor` on this machine."""

from __future__ import annotations

import typer
from typer.testing import CliRunner

import guda_fast
from guda_fast import _C
from guda_fast.cli import doctor as module


def run_doctor() -> str:
    app = typer.Typer()
    app.command()(module.doctor)
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 0, done.output
    return done.output


def test_names_what_runs() -> None:
    text = run_doctor()
    assert f"guda_fast {guda_fast.__version__}" in text
    assert f"add_noise on cpu: cpp, available ({_C.instruction_set()})" in text
    assert "denoising_error on cpu: reference, available" in text
    assert f"this processor runs: {', '.join(_C.instruction_sets())}" in text
    assert str(guda_fast.build_config()["source_hash"]) in text


def test_without_the_extension(monkeypatch) -> None:
    monkeypatch.setattr("guda_fast._backends.native", lambda: None)
    text = run_doctor()
    assert "add_noise on cpu: cpp, unavailable: the extension guda_fast._C was not built" in text


def test_missing_package_is_said(monkeypatch) -> None:
    monkeypatch.setattr(module, "_EXTRAS", ("no-such-package-here",))
    assert "no-such-package-here not installed" in run_doctor()


def test_without_nvcc(monkeypatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert "nvcc: not on PATH" in run_doctor()
