"""The counterfactual of one group: held in memory, or read from its files when it is used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import cast

from guda_fast.deltas.base import Base
from guda_fast.deltas.delta import Delta, LazyParts, Part
from guda_fast.deltas.diff import differences, fitted, fitting
from guda_fast.deltas.resident import ResidentModel
from guda_fast.deltas.sources import Openable, SourceLike, open_source, resolved
from guda_fast.deltas.weights import Weights
from guda_fast.errors import CheckpointError


class HeldGroup:
    """A counterfactual that came as an object: its delta is kept.

    delta: checked, and in tensors that nobody else holds
    resident: the model that it is written into
    """

    def __init__(self, delta: Delta, resident: ResidentModel) -> None:
        self._parts = dict(sorted(delta.parts.items()))
        self._resident = resident
        self.files: tuple[Path, ...] = ()
        self.origin = delta.origin
        self.lay_out()

    @property
    def names(self) -> Collection[str]:
        """The names of the parts."""
        return self._parts.keys()

    def parts(self, only: Collection[str] | None = None) -> Iterable[tuple[str, Part]]:
        """The parts in the order of their names."""
        return self._parts.items()

    def delta(self, support: Callable[[], Collection[str]]) -> Delta:
        """The delta."""
        return Delta(MappingProxyType(self._parts), self.origin)

    def lay_out(self) -> None:
        """Give dense parts the memory layout of the resident tensors, one after the other."""
        for name, part in self._parts.items():
            self._parts[name] = self._resident.laid_out(name, part)


class FileGroup:
    """A counterfactual in files: nothing of it is kept but where it is.

    open_checked: opens its files and checks all that can be checked without values
    resident: the model that it is written into
    Raises: CheckpointError from ``open_checked``
    """

    def __init__(self, open_checked: Callable[[], Weights], resident: ResidentModel) -> None:
        weights = open_checked()
        self._open_checked = open_checked
        self._resident = resident
        self.files = weights.files
        self._stamps = {path: _stamp(path) for path in weights.files}
        self.origin = weights.origin

    def parts(self, only: Collection[str] | None = None) -> Iterable[tuple[str, Part]]:
        """The parts in the order of their names, each read when its turn comes.

        only: the names to read; None for all
        Raises: CheckpointError when the files have changed, or hold values that cannot be used
        """
        return self._checked(self.open(), only)

    def delta(self, support: Callable[[], Collection[str]]) -> Delta:
        """The delta, each part of which is read whenever it is asked for.

        support: gives the names of the parts
        """
        opened = cache(self.open)  # once, however many parts are asked for
        return Delta(LazyParts(support, lambda name: self.part(opened(), name)), self.origin)

    def lay_out(self) -> None:
        """Nothing to do: parts are formed in the layout of the resident model."""

    def open(self) -> Weights:
        """Open the files again, if they are still those that the bank was loaded from."""
        self.check_unchanged()
        return self._open_checked()

    def check_unchanged(self) -> None:
        """Raise CheckpointError where a file is not the one that the bank was loaded from."""
        for path, stamp in self._stamps.items():
            found = _stamp(path)
            if found != stamp:
                what = "is gone" if found is None else "has changed"
                raise CheckpointError(f"{path}: {what} since DeltaBank.load read its header; load the bank again")

    def part(self, weights: Weights, name: str) -> Part:
        """One part of opened files."""
        self.check_unchanged()
        return dict(self._checked(weights, (name,)))[name]

    def _checked(self, weights: Weights, only: Collection[str] | None) -> Iterator[tuple[str, Part]]:
        """The parts of opened files, which must be after the last tensor what they were before the first.

        Else a file that is written while it is read would give some of both.
        """
        try:
            yield from differences(self._resident.tensors, weights, self._resident.theta_0, only)
        except CheckpointError:
            self.check_unchanged()  # says more than what is wrong with half a file
            raise
        self.check_unchanged()


Group = HeldGroup | FileGroup


def open_group(source: SourceLike, name: str, base: Base, resident: ResidentModel) -> Group:
    """Open the counterfactual of one group, and check it against the base as far as headers tell.

    source: checked with ``check_source``, no pack
    name: what the argument is called in messages about an object in memory
    Raises: CheckpointError for what cannot be read or does not fit the base; TypeError when a callable gives something
        that cannot be opened
    """
    what, how = resolved(source, name)
    if isinstance(what, Delta):
        return HeldGroup(fitted(resident.tensors, what, name), resident)

    def opened() -> Weights:
        return fitting(resident.tensors, open_source(cast(Openable, what), how, name, base))

    if isinstance(what, Path):
        return FileGroup(opened, resident)
    weights = opened()
    return HeldGroup(Delta(dict(differences(resident.tensors, weights, resident.theta_0)), weights.origin), resident)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
