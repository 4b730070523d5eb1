"""What an installation says about its own build."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import guda_fast
from guda_fast import _C
from guda_fast.build_config import source_hash

ROOT = Path(__file__).resolve().parent.parent


def test_contents() -> None:
    config = guda_fast.build_config()
    assert config["native"] is True
    assert config["version"] == guda_fast.__version__
    assert isinstance(config["compiler"], str)
    assert config["compiler"].split()[0] in {"GNU", "Clang", "AppleClang"}
    assert isinstance(config["cuda"], bool)
    assert isinstance(config["openmp"], bool)


def test_flags_keep_the_bits() -> None:
    """Equal results on every instruction set rest on these."""
    flags = str(guda_fast.build_config()["flags"]).split()
    assert "-ffp-contract=off" in flags
    assert not {"-ffast-math", "-Ofast", "-march=native"} & set(flags)


def test_instruction_sets_that_run_were_built() -> None:
    built = guda_fast.build_config()["instruction_sets"]
    assert isinstance(built, list)
    assert built[0] == "baseline"
    assert set(_C.instruction_sets()) <= set(built)


def test_extension_is_built_from_this_checkout() -> None:
    """Fails where C++ was edited and not built again; `make test` builds it."""
    assert guda_fast.build_config()["source_hash"] == source_hash(ROOT)


def test_source_hash_sees_an_edit(tmp_path: Path) -> None:
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    source = tmp_path / "csrc" / "cpu" / "a.cpp"
    source.write_text("int a;")
    before = source_hash(tmp_path)
    source.write_text("int b;")
    assert source_hash(tmp_path) != before
    (tmp_path / "README.md").write_text("text is not source")
    source.write_text("int a;")
    assert source_hash(tmp_path) == before


def test_cuda_status() -> None:
    status = _C.cuda_status()
    assert status["compiled"] is guda_fast.build_config()["cuda"]
    if status["compiled"]:
        assert int(status["runtime_version"]) >= 11000
        # Either devices were counted or the driver's own words say why not.
        assert (status["error"] == "") == (int(status["driver_version"]) > 0 and int(status["device_count"]) > 0)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    # By its function the name guda_fast.build_config hides the module.
    monkeypatch.setattr(sys.modules["guda_fast.build_config"], "native", lambda: None)
    assert guda_fast.build_config() == {"version": guda_fast.__version__, "native": False}
