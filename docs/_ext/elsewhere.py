"""Links from pages to files outside docs/: to the page that shows the file, or else to a copy of it in the site.

On a code host the same links lead to the files themselves.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

_SHOWN = {"../kernels/NOISE.md": "noise.md", "../benchmarks/README.md": "measuring.md", "../CHANGELOG.md": "changes.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s]+)\)")


def _here(match: re.Match[str], page: str) -> str:
    text, target = match.groups()
    if target in _SHOWN and _SHOWN[target] != page:
        return f"[{text}]({_SHOWN[target]})"
    return f"{{download}}`{text.replace('`', '')} <{target}>`"


def _rewrite(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = _LINK.sub(lambda match: _here(match, f"{page}.md"), source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("source-read", _rewrite)
    return {"parallel_read_safe": True}
