"""A pack that gets the groups of a queue as they are finished."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from guda_fast.deltas import Pack, append_pack, build_pack
from guda_fast.deltas.delta import HASH_BYTES
from guda_fast.deltas.pack_format import SourceFile
from guda_fast.errors import CheckpointError


class Packer:
    """Adds finished models to a pack, which is made with the first of them.

    path: of the pack. base: the folder that the models were made from. models: the folder that they are in, by group.
    names: of the groups that are going to be there.

    Raises CheckpointError where the pack has a group of this name already that is another model.
    """

    def __init__(self, path: Path, base: Path, models: Path, names: Sequence[str] = ()) -> None:
        if models.absolute() in path.absolute().parents:
            raise ValueError(f"--pack: must not be among the models in {models}, got {path}")
        self._path, self._base, self._models = path, base, models
        self._known: set[str] = set()  # of the pack's, those that have been compared with their folders
        if not path.exists():
            return
        pack = Pack.open(path)
        for group in pack.groups:
            if group in names or (models / group).is_dir():
                self._check(pack, group)

    def add(self, groups: Sequence[str]) -> None:
        """Append the models that are not in the pack; CheckpointError where it has another one by a group's name."""
        # Looked up each time: another command may add to it too.
        pack = Pack.open(self._path) if self._path.exists() else None
        packed = () if pack is None else pack.groups
        for group in groups:
            if pack is not None and group in packed and group not in self._known:
                self._check(pack, group)
        new = {group: self._models / group for group in groups if group not in packed}
        if not new:
            return
        if self._path.exists():
            append_pack(self._path, new, base=self._base)
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            build_pack(self._base, new, self._path)
        self._known.update(new)

    def _check(self, pack: Pack, group: str) -> None:
        sources, folder = pack[group].sources, self._models / group
        if not sources or not all(_is_same(source, folder) for source in sources):
            found = ", ".join(source.path for source in sources) or "one of no file"
            raise CheckpointError(
                f"{self._path}: group {group!r} must be the model in {folder}, found another ({found}); "
                "choose another pack"
            )
        self._known.add(group)


def _is_same(source: SourceFile, folder: Path) -> bool:
    """Whether a packed file is in a folder as it was packed."""
    path = Path(source.path)
    if folder.resolve() not in path.resolve().parents:
        return False
    if not path.is_file() or path.stat().st_size != source.bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=HASH_BYTES)).hexdigest() == source.hash
