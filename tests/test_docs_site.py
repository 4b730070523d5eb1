"""The site of docs/: what it must have, how docstrings become pages, and a build without a warning or a network."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import guda_fast

pytest.importorskip("sphinx")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    return importlib.import_module(request.param)


def toctree(page: Path) -> set[Path]:
    """The pages that a page's tables of contents name."""
    blocks = re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line and not line.startswith(":")]
    return {page.parent / f"{line}.md" for line in lines}


def test_every_page_is_in_a_table_of_contents() -> None:
    named = toctree(DOCS / "index.md") | toctree(DOCS / "api" / "index.md")
    assert named | {DOCS / "index.md"} == set(DOCS.rglob("*.md"))


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "api" / "guda_fast.md").read_text()
    named = re.findall(r"^\.\. auto\w+:: (\w+)", text, flags=re.MULTILINE)
    assert sorted([*named, "__version__"]) == sorted(guda_fast.__all__)


@pytest.mark.parametrize("extension", ["measurements"], indirect=True)
def test_every_file_of_results_is_on_the_page_of_measurements(extension: ModuleType) -> None:
    said: dict[str, str] = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.csv")):
        text = extension.section(path, said)
        assert text.startswith(f"## {path.stem}\n")
        assert f"](../benchmarks/results/{path.name}), " in text
        assert "\n| --- " in text or "\n| ---: " in text, path
    assert extension.MARK in (DOCS / "benchmarks.md").read_text()


@pytest.mark.parametrize("extension", ["measurements"], indirect=True)
def test_a_file_of_results_that_nothing_describes(extension: ModuleType) -> None:
    with pytest.raises(Exception, match="must say what results/unheard_of.csv is"):
        extension.described("unheard_of")


@pytest.mark.parametrize("extension", ["measurements"], indirect=True)
def test_ratios_of_a_case_stand_in_one_line(extension: ModuleType, tmp_path: Path) -> None:
    rows = ["op,backend,shapes,dtype,threads,instruction_set,rival,rival_median_ms,median_ms,ratio"]
    rows += [f"add,{name},R=1,float32,1,AVX2,eager,8,{ms},{8 / ms}" for name, ms in (("eager", 8), ("cpp", 2))]
    path = tmp_path / "noise_ops_cpu.csv"
    path.write_text("\n".join(rows) + "\n")
    assert "| shapes | eager, ms | cpp |\n| --- | ---: | ---: |\n| R=1 | 8 | 4 |" in extension.section(path, {})


@pytest.mark.parametrize("extension", ["elsewhere"], indirect=True)
def test_links_to_files_outside_the_pages(extension: ModuleType) -> None:
    text = ["[a](../benchmarks/results/a.csv) [b](../kernels/NOISE.md) [c](scores.md) ![d](../d.svg)"]
    extension._rewrite(None, "scores", text)
    assert text == ["{download}`a <../benchmarks/results/a.csv>` [b](noise.md) [c](scores.md) ![d](../d.svg)"]


@pytest.mark.parametrize("extension", ["docstrings"], indirect=True)
def test_a_docstring_as_restructuredtext(extension: ModuleType) -> None:
    text = """Scores of `Racing`; |x|_2 and *stars* are text.

    s = sum of e

images, ids: what is scored
    and known [(N,), see docs/queries.md]. top: how many.
Returns: `scores`s

>>> f(1)
1"""
    assert extension.convert(text.splitlines(), {"Racing": "guda_fast.Racing"}) == [
        "",
        "Scores of :py:obj:`Racing <guda_fast.Racing>`; \\|x\\|\\_2 and \\*stars\\* are text.",
        "",
        "::",
        "",
        "    s = sum of e",
        "",
        "",
        "* **images, ids**: what is scored and known [(N,), see :doc:`docs/queries.md </queries>`]. top: how many.",
        "* **Returns**: ``scores``\\ s",
        "",
        ">>> f(1)",
        "1",
        "",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("extension", ["docstrings"], indirect=True)
def test_the_site_builds_without_a_warning_and_without_a_network(extension: ModuleType, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-d",
        tmp_path / "trees",
        DOCS,
        tmp_path / "site",
    ]
    without = {name: value for name, value in os.environ.items() if not name.lower().endswith("proxy")}
    offline = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    built = subprocess.run(command, capture_output=True, text=True, check=False, env={**without, **offline})
    assert built.returncode == 0, built.stderr

    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((tmp_path / "site" / "objects.inv").read_bytes(), uri="")
    documented = {name for kind, of in inventory.data.items() if kind.startswith("py:") for name in of}
    assert set(extension.public().values()) - {"guda_fast.__version__"} <= documented

    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    for page in pages:
        fetched = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*\"", page.read_text())
        assert not fetched, page
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", sheet.read_text()), sheet
