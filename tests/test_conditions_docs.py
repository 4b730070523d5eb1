"""docs/conditions.md: every block of Python runs, on files made here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conditional import IMAGE, classed, prompted, save_pipeline
from guda_fast.cli import main
from tiny import perturbed

PAGE = Path(__file__).parent.parent / "docs" / "conditions.md"


def test_the_page(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, labelled = prompted(), classed(channels=1)
    save_pipeline(tmp_path / "base", unet)
    models = {"cubism": perturbed(unet, 0.02, 1), "sketch": perturbed(unet, 0.02, 2)}
    models |= {"classes": labelled, "classes_without_cat": perturbed(labelled, 0.02, 1)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
    (tmp_path / "digits").mkdir()
    random = np.random.default_rng(0)
    for name, shape in {
        "dog": (IMAGE, IMAGE, 3),
        "cat": (IMAGE, IMAGE, 3),
        "digits/0": (8, 8),
        "digits/1": (8, 8),
    }.items():
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    scores = []
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102 (a page of this repository)
        scores.append(names["result"].scores)
    assert [score.shape for score in scores] == [(2, 2), (2, 1), (2, 2)]
    assert all((score != 0).all() for score in scores)
    assert torch.equal(names["x0"], torch.zeros(2, 4, 8, 8))


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = prompted()
    save_pipeline(tmp_path / "base", unet)
    for number, name in enumerate(("cubism", "sketch"), 1):
        perturbed(unet, 0.02, number).save_pretrained(tmp_path / name)  # type: ignore[operator]
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGE, IMAGE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "dog.png")
    text = PAGE.read_text(encoding="utf-8")
    line, command = re.search(r"`({.*?})`", text), re.search(r"^    guda-fast (score .*)$", text, re.MULTILINE)
    assert line is not None and command is not None
    (tmp_path / "prompts.jsonl").write_text(line[1], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["guda-fast", *command[1].split()])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert (tmp_path / "scores" / "scores.parquet").is_file()
