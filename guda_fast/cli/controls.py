"""Which groups on a command line are controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from guda_fast.results import Attribution

CONTROL_NAMES = "control-*"
"""What the control groups of a data set are called (``datasets.with_controls``)."""


def control_names(groups: Sequence[str], pattern: str | None) -> list[str]:
    """The groups that are controls by their names.

    pattern: as in a shell; None for ``CONTROL_NAMES``, which need not be there, and are groups where there is no other
    Raises ValueError where a given pattern fits no group, or every group.

    >>> control_names(["cat", "control-0"], None)
    ['control-0']
    """
    found = _matching(groups, CONTROL_NAMES if pattern is None else pattern)
    if pattern is not None and not found:
        wanted = f"a folder, or a pattern that fits some of {', '.join(groups)}"
        raise ValueError(f"--controls: must be {wanted} and not all, got {pattern!r}")
    return found


def _matching(groups: Sequence[str], pattern: str) -> list[str]:
    """The groups of such names; none where all have them, of which none could be compared with the others."""
    found = [group for group in groups if fnmatchcase(group, pattern)]
    return found if len(found) < len(groups) else []


def without_controls(result: Attribution, pattern: str | None = None) -> Attribution:
    """A result without the groups that are controls by their names; the same where there are none."""
    names = _matching(result.groups, CONTROL_NAMES if pattern is None else pattern)
    return result.select([group for group in result.groups if group not in names]) if names else result


def read_scores(path: Path) -> Attribution:
    """A result: a folder, its scores.parquet, or a wide CSV."""
    return Attribution.from_csv(path) if path.suffix == ".csv" else Attribution.from_parquet(path)


def given_controls(methods: Sequence[str], entries: Sequence[str] | None) -> tuple[dict[str, Path], str | None]:
    """Files of scores of controls by the name of their method, and the pattern of controls' names, if there is one.

    methods: names of results
    entries: NAME=PATH of scores of a method's controls, PATH for the only method, or a pattern of group names
    Raises ValueError where an entry is none of these.
    """
    null: dict[str, Path] = {}
    pattern = None
    for entry in entries or ():
        name, separator, path = entry.partition("=")
        if separator and name in methods:
            null[name] = Path(path)
        elif Path(entry).exists() or (separator and Path(path).exists()):
            if len(methods) > 1 or not Path(entry).exists():
                raise ValueError(f"--controls: must be NAME=PATH with NAME one of {', '.join(methods)}, got {entry!r}")
            null[methods[0]] = Path(entry)
        elif pattern is not None:
            raise ValueError(f"--controls: must have one pattern of group names, got {pattern!r} and {entry!r}")
        else:
            pattern = entry
    return null, pattern


def attach_controls(
    methods: Mapping[str, Attribution], null: Mapping[str, Path], pattern: str | None
) -> dict[str, Attribution]:
    """Results with p-values where they have controls, and without control groups.

    methods: results by name
    null, pattern: as from ``given_controls``; of a file that holds other groups too, those with names of controls count
    Raises ValueError where the pattern fits no group or all, or a file's controls are groups of its method.
    """
    if pattern is not None:
        control_names(sorted({group for result in methods.values() for group in result.groups}), pattern)
    return {name: _attached(name, result, null.get(name), pattern) for name, result in methods.items()}


def _attached(name: str, result: Attribution, path: Path | None, pattern: str | None) -> Attribution:
    if path is not None:
        null = read_scores(path)
        names = _matching(null.groups, CONTROL_NAMES if pattern is None else pattern)
        try:
            return without_controls(result, pattern).with_p_values(null.select(names) if names else null)
        except ValueError as error:
            raise ValueError(f"--controls: {name}: {path}: {error}") from error
    names = _matching(result.groups, CONTROL_NAMES if pattern is None else pattern)
    return result.with_p_values(names) if names else result
