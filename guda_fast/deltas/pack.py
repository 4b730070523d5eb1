"""Delta packs: all groups of a bank in one file, or a few, of which a group can be read alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from guda_fast._validate import check_choice
from guda_fast.deltas.base import Base
from guda_fast.deltas.delta import Delta, LazyParts, Part, TensorHash
from guda_fast.deltas.diff import BaseTensor
from guda_fast.deltas.formats.diffusers import check_config
from guda_fast.deltas.pack_file import PackFile, Shard
from guda_fast.deltas.pack_format import HeaderProblem, IndexEntry, Rounding, SourceFile, index_entries
from guda_fast.deltas.resident import ResidentModel
from guda_fast.deltas.survey import Survey
from guda_fast.deltas.weights import Weights, existing_path
from guda_fast.errors import CheckpointError


@dataclass(frozen=True)
class PackedGroup:
    """What a pack's header says of one group.

    name: of the group
    origin: the path or description of the counterfactual that it was made from
    sources: its files as they were then, none for an object in memory
    survey: of the delta as it is stored
    ranks: of the low-rank parts, by parameter
    rounding: what storing changed; a cosine of 1 and an error of 0 where nothing
    """

    name: str
    origin: str
    sources: tuple[SourceFile, ...]
    survey: Survey
    ranks: Mapping[str, int]
    rounding: Rounding


class Pack:
    """The groups of a delta pack; made by ``Pack.open``, ``build_pack`` and ``append_pack``.

    Headers are read and checked when the pack is opened; a group's values when they are asked for, and no other's.
    What is read is compared with its checksum.

    >>> pack = Pack.open("bank.safetensors")  # doctest: +SKIP
    >>> pack["cat"].survey.kind  # doctest: +SKIP
    'dense'
    """

    def __init__(self, file: PackFile, shards: Sequence[Shard]) -> None:
        self.path = file.path
        self.hash = file.hash
        self._shards = tuple(shards)
        self._places: dict[str, tuple[Shard, int]] = {}
        first = shards[0]
        for shard in shards:
            if shard.header.base_hash != first.header.base_hash:
                raise CheckpointError(f"{shard.path}: key 'base.hash' must be that of {first.path}, found another")
            for position, group in enumerate(shard.header.groups):
                if group.name in self._places:
                    other = self._places[group.name][0].path
                    raise CheckpointError(f"{shard.path}: key 'groups' holds group {group.name!r}, as does {other}")
                self._places[group.name] = shard, position

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Pack:
        """Open a pack: read and check its headers, and no values.

        path: what ``build_pack`` wrote
        Returns: the pack, whose files are opened again when a group is read
        Raises: CheckpointError when there is no such file, it is no pack, of another version, cut off or damaged, or a
            file that it names is not there, naming the file and the key
        """
        # In full, so that a change of the working directory changes nothing; beside the file itself lie its others.
        path = existing_path(path).resolve()
        file = PackFile(path)
        if "files" not in file.content:
            return cls(file, [Shard(file)])
        try:
            entries = index_entries(file.content)
            if not entries:
                raise HeaderProblem("key 'files' must name a file, found none")
        except HeaderProblem as problem:
            raise CheckpointError(f"{path}: {problem}") from None
        shards = []
        for entry in entries:
            other = PackFile(path.parent / entry.file)
            if (other.size, other.hash) != (entry.bytes, entry.hash):
                raise CheckpointError(
                    f"{other.path}: must be the file that {path} names, found another, or a part of it"
                )
            shards.append(Shard(other))
        return cls(file, shards)

    @property
    def groups(self) -> tuple[str, ...]:
        """The group names, in the order in which they were added."""
        return tuple(self._places)

    @property
    def base_hash(self) -> str:
        """``DeltaBank.weights_hash`` of the base that the pack belongs to."""
        return self._shards[0].header.base_hash

    @property
    def base_origin(self) -> str:
        """The folder of the base when the pack was built; empty where it was an object in memory."""
        return self._shards[0].header.base_origin

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the groups."""
        return tuple(shard.path for shard in self._shards)

    @property
    def entries(self) -> tuple[IndexEntry, ...]:
        """What an index says of ``files``."""
        return tuple(shard.entry for shard in self._shards)

    @property
    def settings(self) -> tuple[tuple[str, str, float], ...]:
        """For each of ``files`` the dtype, rank and tolerance that its writer was asked for."""
        headers = [shard.header for shard in self._shards]
        return tuple((header.dtype, header.rank, header.tolerance) for header in headers)

    def __getitem__(self, group: str) -> PackedGroup:
        """What the header says of a group; ValueError where there is none of this name."""
        shard, position = self._place(group)
        header, summary = shard.header.groups[position], shard.summary(position)
        survey = Survey(
            f"{self.path}: group {group!r}",
            summary.kinds,
            header.hash,
            summary.bytes,
            summary.values,
            header.relative_rms,
            header.cosine,
        )
        return PackedGroup(group, header.origin, header.sources, survey, summary.ranks, header.rounding)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"Pack({str(self.path)!r}, {len(self)} groups)"

    def parts(self, group: str, only: Collection[str] | None = None) -> Iterator[tuple[str, Part]]:
        """The parts of a group in the order of their names, each read when its turn comes.

        only: the names to read; None for all
        Returns: of names and parts in float32 or float64
        Raises: ValueError when there is no such group; CheckpointError where bytes are not those that were written
        """
        shard, position = self._place(group)
        return shard.parts(position, only)

    def delta(self, group: str) -> Delta:
        """The delta of a group, each part of which is read whenever it is asked for."""
        packed = self[group]
        parts = LazyParts(lambda: packed.survey.support, lambda name: dict(self.parts(group, (name,)))[name])
        return Delta(parts, packed.origin)

    def verify(self, group: str) -> None:
        """Read all of a group, and compare it with its hash; CheckpointError where it is another."""
        digest = TensorHash()
        for name, part in self.parts(group):
            digest.add_part(name, part)
        if digest.hex() != self[group].survey.hash:
            raise CheckpointError(f"{self.path}: group {group!r}: key 'hash' must be that of the values, found another")

    def check_base(self, base: Base, weights_hash: str) -> None:
        """Raise CheckpointError unless the pack belongs to the base that has this hash, and this configuration.

        A setting that only the base names must have its default: the pack may be older than it.
        """
        if weights_hash != self.base_hash:
            raise CheckpointError(
                f"{self.path}: key 'base.hash' must be that of the base, {weights_hash} ({base.origin}), "
                f"found {self.base_hash} ({self.base_origin or 'an object in memory'})"
            )
        if base.config is None:
            return
        for shard in self._shards:
            config, where = shard.header.base_config, f"{shard.path}: key 'base.config'"
            check_config(base.config, type(base.model), Weights(where, {}, config=config, config_origin=where))

    def check_fits(self, tensors: Iterable[BaseTensor]) -> None:
        """Raise CheckpointError where a part does not fit the base's tensors."""
        named = {tensor.name: tensor for tensor in tensors}
        for shard in self._shards:
            shard.check_fits(named)

    def only_group(self, name: str) -> str:
        """The one group of the pack; CheckpointError where it has more, which calls the argument ``name``."""
        if len(self) > 1:
            raise CheckpointError(
                f"{self.path}: must hold one group to be {name}, found {len(self)}; for all of them pass the pack "
                "in place of the mapping"
            )
        return self.groups[0]

    def _place(self, group: str) -> tuple[Shard, int]:
        return self._places[check_choice("Pack", "group", group, self._places)]


class PackGroup:
    """A counterfactual in a pack: nothing of its values is kept.

    pack: whose base was checked
    resident: the model that it is written into
    """

    def __init__(self, pack: Pack, group: str, resident: ResidentModel) -> None:
        self._pack = pack
        self._group = group
        self._resident = resident
        self.packed = pack[group]
        self.survey = self.packed.survey
        self.origin = self.survey.origin
        self.files = tuple(dict.fromkeys((pack.path, *pack.files)))

    def parts(self, only: Collection[str] | None = None) -> Iterator[tuple[str, Part]]:
        """The parts in the order of their names, in the resident layout, each read when its turn comes.

        only: the names to read; None for all
        """
        for name, part in self._pack.parts(self._group, only):
            yield name, self._resident.laid_out(name, part)
            del part  # the next one is read into its memory

    def delta(self, support: Callable[[], Collection[str]]) -> Delta:
        """The delta, each part of which is read whenever it is asked for."""
        return Delta(LazyParts(lambda: self.survey.support, lambda name: dict(self.parts((name,)))[name]), self.origin)

    def lay_out(self) -> None:
        """Nothing to do: parts are formed in the layout of the resident model."""
