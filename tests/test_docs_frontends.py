"""Every command of docs/frontends.md runs, on files named as there, and writes what the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from canvas_cases import folder, one_thread
from cifar_cases import images, models, rows_of
from guda_fast.frontends import cifar10, unlearncanvas

__all__ = ["folder", "images", "models", "one_thread"]
PAGE = (Path(__file__).parents[1] / "docs/frontends.md").read_text()
COMMANDS = [shlex.split(block.replace("\\\n", " ")) for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)]
MAINS = {"guda_fast.frontends.cifar10": cifar10.main, "guda_fast.frontends.unlearncanvas": unlearncanvas.main}
# Protocols of hundreds of timesteps, of which a few say as much here.
SHORT = {"guda_fast.frontends.cifar10": "--max_t", "guda_fast.frontends.unlearncanvas": "--max_timestep"}


@pytest.fixture
def at_work(models: Path, images: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything where the page has it."""
    monkeypatch.chdir(tmp_path)
    for name, target in {
        "generated": images,
        "runs/full/latest": models / "base",
        "runs/retrack": models / "unlearned",
        "runs/logo": models / "logo",
        "sd15": folder / "model",
        "runs/all": folder / "all",
        "runs/awss": folder / "unlearned",
        "runs/logo_styles": folder / "logo",
        "images": folder / "images",
        "prompts.jsonl": folder / "prompts.jsonl",
    }.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(target)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[2:5]))
def test_the_command_runs(command: list[str], at_work: Path) -> None:
    assert command[:2] == ["python", "-m"]
    MAINS[command[2]]([*command[3:], SHORT[command[2]], "20"])
    written = {path.relative_to(at_work).as_posix() for path in at_work.glob("scores/*.csv")}
    assert written and all(name in PAGE for name in written)
    for name in written:
        assert len(rows_of(at_work / name)) > 1
    assert ("base.npz" in command) == (at_work / "base.npz").is_file()


def test_the_page_has_commands_of_both() -> None:
    assert {command[2] for command in COMMANDS} == set(MAINS)
