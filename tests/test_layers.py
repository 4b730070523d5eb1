"""Imports point downward, as CONTRIBUTING.md says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import guda_fast

PACKAGE = Path(guda_fast.__file__).parent
PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"


def layers() -> list[str]:
    """From the top down."""
    (text,) = re.findall(r"Imports point downward through these layers: (.*?)\.", PAGE.read_text(), flags=re.DOTALL)
    return re.findall(r"`(\w+)`", text)


def imports(path: Path) -> Iterator[str]:
    """The layers that a module imports from, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("guda_fast."))


def test_imports_point_downward() -> None:
    height = {name: -number for number, name in enumerate(layers())}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own in height:
            found += [f"{path} imports {name}" for name in imports(path) if height.get(name, height[own]) > height[own]]
    assert not found


def test_every_part_of_the_package_has_its_layer() -> None:
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert parts - {"kernels"} <= set(layers())
