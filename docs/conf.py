"""Sphinx: `make docs` builds docs/ into build/docs. Nothing is fetched, neither here nor by the pages."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

from guda_fast import __version__  # noqa: E402 (after the path, as what follows)

project = "guda_fast"
author = "the guda_fast authors"
version = release = __version__
language = "en"
extensions = ["myst_parser", "sphinx.ext.autodoc", "docstrings", "elsewhere", "measurements"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_ext"]

# Indented blocks are formulas and command lines, in no one language.
highlight_language = "none"
pygments_style = "friendly"
pygments_dark_style = "github-dark"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {
    name: name
    for name in (
        *("ArrayLike", "BoolArray", "Candidates", "ConditionSource", "CountArray", "FloatArray", "IntArray"),
        *("NDArray", "QuerySource", "SourceLike"),
    )
}
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"

# Links are checked, but for types in signatures that are not documented here: those of other libraries, whose
# inventories would have to come from the network, and those that no package of ours exports.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!guda_fast\b).*"),
    ("py:class", r"guda_fast\.(\w+|\w+\.[\w.]+)\.\w+"),
]

html_theme = "furo"
html_title = "guda_fast"
html_show_sourcelink = False
html_copy_source = False
html_show_sphinx = False
html_last_updated_fmt = None
