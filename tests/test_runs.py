"""Training runs on disk: whole or absent, reused only with the same settings, and full disks."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from guda_fast import CheckpointError
from guda_fast.counterfactuals.runs import check_alike, finished, save_run, unfinished
from tiny import tiny_unet

SETTINGS = {"run": "base", "steps": 3, "lr": 0.001, "grad_clip": None}


def test_a_saved_run_is_finished_with_its_settings_only(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "base"
    assert not finished(folder, SETTINGS)
    save_run(folder, tiny_unet().save_pretrained, SETTINGS, [3.0, 2.0, 1.0], 0.1)
    assert finished(folder, SETTINGS)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["base"]
    with pytest.raises(CheckpointError, match=r"other settings \(steps: wanted 4, found 3\)"):
        finished(folder, {**SETTINGS, "steps": 4})
    with pytest.raises(CheckpointError, match=r"other settings \(lambda: wanted 1, found None\)"):
        finished(folder, {**SETTINGS, "lambda": 1})


@pytest.mark.parametrize("content", ["", '{"settings": ', "[]", '{"settings": 3}'])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"training\.json: "):
        finished(tmp_path, SETTINGS)


def test_an_empty_folder_is_taken_and_one_with_the_users_own_files_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    assert not finished(folder, SETTINGS)
    save_run(folder, tiny_unet().save_pretrained, SETTINGS, [1.0], 0.1)
    assert finished(folder, SETTINGS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="mine: must be new, empty, or a run of this command") as caught:
        finished(tmp_path / "mine", SETTINGS)
    assert "remove" not in str(caught.value)


def test_runs_of_other_series_are_refused_by_name(tmp_path: Path) -> None:
    settings = {**SETTINGS, "run": "unlearned", "group": "a", "members": "1", "options": {"weight": 1}}
    save_run(tmp_path / "a", tiny_unet().save_pretrained, settings, [1.0], 0.1)
    save_run(tmp_path / "full", tiny_unet().save_pretrained, SETTINGS, [1.0], 0.1)  # a base is none of them
    check_alike(tmp_path, {**settings, "group": "b", "members": "2", "steps": 9})
    with pytest.raises(CheckpointError, match=r"a/training.json: .* \(options.weight: wanted 2, found 1\)"):
        check_alike(tmp_path, {**settings, "group": "b", "options": {"weight": 2}})
    (tmp_path / "a" / "training.json").write_text("[]")
    check_alike(tmp_path, {**settings, "options": {"weight": 2}})


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no")])
def test_nothing_is_left_of_an_unfinished_folder(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), unfinished(tmp_path / "base") as folder:
        (folder / "half").write_text("written")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    """A file size limit makes the real write of the weights fail, as a full disk does."""
    script = f"""
        import pathlib, resource
        from guda_fast.counterfactuals.runs import save_run
        from tiny import tiny_unet
        model = tiny_unet()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            save_run(pathlib.Path({str(tmp_path)!r}) / "base", model.save_pretrained, {{}}, [1.0], 1.0)
        except OSError as error:
            print(error)
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert f"{tmp_path}/base: cannot be written" in found.stdout, found.stderr
    assert not list(tmp_path.iterdir())
