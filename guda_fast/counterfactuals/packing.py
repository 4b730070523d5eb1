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

    Raises CheckpointError where the pack has a group of this name already that is another model.
    """

    def __init__(self, path: Path, base: Path, models: Path) -> None:
        if models.absolute() in path.absolute().parents:
            raise ValueError(f"--pack: must not be among the models in {models}, got {path}")
        self._path, self._base, self._models = path, base, models
        if not path.exists():
            return
        pack = Pack.open(path)
        for group in pack.groups:
            if (models / group).is_dir() and not all(_is_same(source) for source in pack[group].sources):
                raise CheckpointError(
                    f"{path}: group {group!r} must be the model in {models / group}, found another; choose another pack"
                )

    def add(self, groups: Sequence[str]) -> None:
        """Append the models that are not in the pack."""
        # Looked up each time: another command may add to it too.
        packed = Pack.open(self._path).groups if self._path.exists() else ()
        new = {group: self._models / group for group in groups if group not in packed}
        if not new:
            return
        if self._path.exists():
            append_pack(self._path, new, base=self._base)
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            build_pack(self._base, new, self._path)


def _is_same(source: SourceFile) -> bool:
    path = Path(source.path)
    if not path.is_file() or path.stat().st_size != source.bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=HASH_BYTES)).hexdigest() == source.hash
