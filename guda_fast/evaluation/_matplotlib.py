"""matplotlib, imported where a figure is drawn."""

from __future__ import annotations

from types import ModuleType


def load_matplotlib(where: str) -> ModuleType:
    """The module with all that the figures use; ModuleNotFoundError naming the extra where it is missing."""
    try:
        import matplotlib
        import matplotlib.backends.backend_agg
        import matplotlib.figure
        import matplotlib.font_manager
        import matplotlib.patches
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{where} needs matplotlib, which the extra 'report' installs: pip install 'guda-fast[report]'",
            name=error.name,
        ) from error
    return matplotlib
