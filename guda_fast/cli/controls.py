"""Which groups on a command line are controls."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

CONTROL_NAMES = "control-*"
"""What the control groups of a data set are called (``datasets.with_controls``)."""


def control_names(groups: Sequence[str], pattern: str | None) -> list[str]:
    """The groups that are controls by their names.

    pattern: as in a shell; None for ``CONTROL_NAMES``, which need not be there
    Raises ValueError where a given pattern fits no group, or a pattern fits every group.

    >>> control_names(["cat", "control-0"], None)
    ['control-0']
    """
    found = [group for group in groups if fnmatchcase(group, CONTROL_NAMES if pattern is None else pattern)]
    if pattern is not None and not found:
        raise ValueError(
            f"--controls: must be a folder, or a pattern of names among {', '.join(groups)}, got {pattern!r}"
        )
    if len(found) == len(groups):
        raise ValueError(f"--controls: must leave a group that is none, got {', '.join(found)}")
    return found
