"""Docstrings as they are written here, as reStructuredText.

They are prose with code in `backticks`, arguments as lines `name: what it is`, formulas as indented blocks or as lines
`name = ...`, and doctests. Arguments become a list, formulas stay as they are, code that names something public becomes
a link to it, and nothing else of the text is taken for markup.
"""

from __future__ import annotations

import builtins
import importlib
import re

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

# The packages of the reference; of a name that several export, the first one's page has it.
PACKAGES = tuple(
    f"guda_fast{name}"
    for name in (
        *("", ".baselines", ".counterfactuals", ".datasets", ".deltas", ".diffusion"),
        *(".engines", ".estimators", ".evaluation", ".forward", ".ops", ".report", ".store"),
    )
)
_ITEM = re.compile(r"([a-z_][\w.]*(?:(?:, | and )[a-z_][\w.]*)*|Returns|Raises|Source): (.+)")
_FORMULA = re.compile(r"[\w\[\], ]+ = ")
_CODE = re.compile(r"(`{1,2})(.+?)\1")
_PAGE = re.compile(r"\bdocs/([\w-]+)\.md\b")
_NAME = re.compile(r"(?:gf\.)?([A-Za-z]\w*)(?:\(.*\))?$")


def public() -> dict[str, str]:
    """Where each exported name is documented; without names that two packages give to two things."""
    where: dict[str, str] = {}
    things: dict[str, object] = {}
    unclear = set()
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            thing = getattr(package, name)
            if things.setdefault(name, thing) is not thing:
                unclear.add(name)
            where.setdefault(name, f"{package.__name__}.{name}")
    return {name: path for name, path in where.items() if name not in unclear}


def _plain(text: str) -> str:
    return _PAGE.sub(r":doc:`\g<0> </\1>`", re.sub(r"([\\*`_|<>])", r"\\\1", text))


def _inline(text: str, where: dict[str, str]) -> str:
    parts, end = [], 0
    for match in _CODE.finditer(text):
        parts.append(_plain(text[end : match.start()]))
        code, end = match[2], match.end()
        name = _NAME.match(code)
        path = code if code in where.values() else where.get(name[1]) if name else None
        # a short word in lower case is more often an option or an argument than a function
        linked = path is not None and (path.count(".") == 1 or not code.islower())
        parts.append(f":py:obj:`{code} <{path}>`" if linked else f"``{code}``")
        parts.append("" if re.match(r"[\s.,:;!?)\]}'\"-]|$", text[end:]) else "\\ ")  # markup ends before these alone
    return "".join([*parts, _plain(text[end:])])


def _pieces(lines: list[str]) -> list[tuple[str, str]]:
    """(name, text) of each argument, ("=", line) of each formula, ("", text) of prose."""
    pieces: list[tuple[str, str]] = []
    for line in lines:
        if item := _ITEM.match(line):
            pieces.append((item[1], item[2]))
        elif _FORMULA.match(line):
            pieces.append(("=", line))
        elif pieces and (line.startswith(" ") or pieces[-1][0] == ""):
            pieces[-1] = (pieces[-1][0], f"{pieces[-1][1]} {line.strip()}")
        else:
            pieces.append(("", line.strip()))
    return pieces


def _block(lines: list[str], where: dict[str, str]) -> list[str]:
    if lines[0].startswith(">>>"):
        return lines
    if all(line.startswith("    ") for line in lines):
        return ["::", "", *lines]
    result: list[str] = []
    before = ""
    for kind, text in _pieces(lines):
        if kind in ("", "=") or before in ("", "="):
            result.append("")
        if kind == "=":
            result.append(f"| ``{text}``")
        else:
            result.append(f"* **{_plain(kind)}**: {_inline(text, where)}" if kind else _inline(text, where))
        before = kind
    return result


def convert(lines: list[str], where: dict[str, str]) -> list[str]:
    """The docstring's lines as reStructuredText."""
    result: list[str] = []
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            result += [*_block(block, where), ""]
            block = []
    return result


def _unlink_builtins(app: Sphinx, doctree: nodes.document) -> None:
    """Sphinx takes `bytes` in a signature for any attribute of that name."""
    for reference in list(doctree.findall(addnodes.pending_xref)):
        if reference["reftype"] == "class" and reference["reftarget"] in vars(builtins):
            reference.replace_self(reference.children)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    where = public()

    def rewrite(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
        lines[:] = convert(lines, where)

    def rename(app: Sphinx, what: str, name: str, thing: object, options: object, *texts: str | None) -> object:
        return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in texts)

    app.connect("autodoc-process-docstring", rewrite)
    app.connect("autodoc-process-signature", rename)
    app.connect("doctree-read", _unlink_builtins)
    return {"parallel_read_safe": True}
