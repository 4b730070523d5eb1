"""docs/datasets.md: its specs and keys are those that are taken, and its code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from guda_fast.datasets import open_dataset

PAGE = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text(encoding="utf-8")
NAMES = {"fashion-mnist": "fashion-mnist", "cifar10": "cifar10", "typefaces": "typefaces", "a folder": "."}


def documented() -> dict[str, set[str]]:
    """The keys by source, of the table."""
    found: dict[str, set[str]] = {}
    source = ""
    for first, key in re.findall(r"^\| ([^|]*?) ?\| `(\w+)` \|", PAGE, re.MULTILINE):
        source = first.strip("`") or source
        found.setdefault(source, set()).add(key)
    return found


def test_every_key_is_in_the_table() -> None:
    keys = documented()
    assert set(keys) == {"every one", *NAMES}
    for source, name in NAMES.items():
        with pytest.raises(ValueError, match="takes") as caught:
            open_dataset(f"{name},no-such-key=1")
        taken = set(re.findall(r"(\w+)=", str(caught.value).partition(" takes ")[2].partition(", got")[0]))
        assert taken == keys[source] | keys["every one"]


def test_the_specs_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "paintings").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("guda_fast.datasets.fonts.standard_folders", list)
    specs = re.findall(r"^\| `([^`]*)` \|", PAGE.partition("| source | key |")[0], re.MULTILINE)
    assert len(specs) == 5
    for spec in specs:
        # What lies in folders is not here; a spec that is not understood says "open_dataset: ...".
        try:
            open_dataset(f"{spec},per_group=1")
        except (OSError, ValueError) as error:
            refused = str(error)
        else:
            refused = ""
        assert not refused.startswith("open_dataset")


def test_the_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, Any] = {}
    exec(compile(blocks[0], "docs/datasets.md", "exec"), names)  # noqa: S102 (a page of this repository)
    assert len(names["record"]["groups"]) == 30
