"""Store: scores on disk, in parts that are written once, by any number of processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guda_fast._files import TEMPORARY, create_file
from guda_fast._validate import check_int, check_real, describe
from guda_fast.diffusion.query_id import NOISE_CONTRACT
from guda_fast.results import RECORD, Attribution
from guda_fast.store import failures, leases, upkeep
from guda_fast.store.failures import Failure
from guda_fast.store.leases import Lease
from guda_fast.store.parts import COLUMNS, OPTIONAL, Block, Piece, encode
from guda_fast.store.run_file import RunFile, differences, json_values, versions
from guda_fast.store.shards import Shard
from guda_fast.store.stored import StoredCells
from guda_fast.store.upkeep import Damage

COMPARED = ("base_hash", "protocol", "conditions", "latents", "precision")
"""What of a result's provenance its scores depend on, besides the deltas of its groups and the estimator."""


class Store(StoredCells):
    """Scores of many queries under many groups, in a folder that processes and machines share.

    What is finished is what is there: a part file holds one shard, some queries under some groups, and appears whole
    or not at all. Parts depend on their cells only, so that a store which was interrupted, restarted or computed by
    many ends with the bytes of one which was not. Any number of processes may do anything below at once.

    path: the folder. settings: what the scores depend on. record: what they do not (versions, commit, config).

    Made by ``create`` and ``open``. Source: docs/store.md.

    >>> store = Store.create("scores", settings, bank.delta_hashes)  # doctest: +SKIP
    >>> store.add_queries(ids, names)  # doctest: +SKIP
    >>> for shard in store.missing():  # doctest: +SKIP
    ...     lease = store.claim(shard, "worker 3", seconds=600)
    ...     if lease is not None:
    ...         with lease:
    ...             store.write(shard, attribute(...))
    """

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        settings: Mapping[str, Any],
        groups: Mapping[str, str],
        *,
        shard_queries: int = 1024,
        shard_groups: int | None = None,
        closed: bool = False,
        record: Mapping[str, Any] | None = None,
    ) -> Store:
        """Make a store, or open the one that is there if it has the same settings; several processes may at once.

        path: a folder that is not there, is empty, or is a store; the folder above it must exist.
        settings: what scores depend on, as JSON values under the names that an ``Attribution``'s provenance has for
            them: base_hash, protocol, conditions, latents, precision; and the settings of the estimator.
        groups: the hash of each group's delta by its name, in order, as ``bank.delta_hashes`` [K >= 1].
        shard_queries, shard_groups: the cells of a part; a store that is there keeps its own
            [>= 1; 1,024 queries, all of these groups].
        closed: whether cells depend on the company of other groups, as those of a race: then no group can be added,
            and a shard has all of them.
        record: further JSON values for run.json, as the config that replays the run.

        Returns the Store. Raises TypeError or ValueError naming the argument, ValueError listing every setting that
        differs, or for a folder that holds something else; OSError where it cannot be written.
        """
        folder = Path(path)
        _check_groups("create", groups)
        if closed and shard_groups not in (None, len(groups)):
            raise ValueError(f"create: shard_groups must be all {len(groups)} where closed, got {shard_groups}")
        run = RunFile(
            settings=json_values("create", "settings", settings),
            groups=dict(groups),
            shard_queries=check_int("create", "shard_queries", shard_queries, 1),
            shard_groups=check_int("create", "shard_groups", shard_groups or len(groups), 1),
            closed=closed,
            record={**versions(), **json_values("create", "record", record or {})},
        )
        folder.mkdir(exist_ok=True)
        others = [name for name in os.listdir(folder) if not name.endswith(TEMPORARY)]
        if others and RECORD not in others:
            raise ValueError(f"{folder}: must be a result store or empty, found {sorted(others)[0]} and no {RECORD}")
        if others or not run.create(folder):
            store = cls.open(folder)
            store.check(settings, groups)
            if store._run.closed != closed:
                raise ValueError(f"{folder / RECORD}: must be of a store with closed={closed}, found another")
            return store
        return cls(folder, run)

    def check(self, settings: Mapping[str, Any], groups: Mapping[str, str] | None = None) -> None:
        """Raise ValueError listing every setting that differs from the store's: its name, the stored value, the given.

        groups: where given, hashes by name: that of a group which the store has must be the same; others may be new,
            unless the store is closed. The noise contract of this library counts among the settings.
        """
        stored: dict[str, Any] = {**self.settings, "noise_contract": self._run.noise_contract}
        given: dict[str, Any] = {**json_values("check", "settings", settings), "noise_contract": NOISE_CONTRACT}
        if groups is not None:
            hashes = self.groups
            if not self.closed:
                hashes, groups = (
                    {name: number for name, number in one.items() if name in other}
                    for one, other in ((hashes, groups), (groups, hashes))
                )
            stored, given = {**stored, "groups": dict(hashes)}, {**given, "groups": dict(groups)}
        self._refuse(f"{self.path}: must be given the settings that it was made with, found", stored, given)

    def add_queries(self, ids: Sequence[int], names: Sequence[str]) -> int:
        """Add queries behind those that are there; what is there already is passed over.

        The same id is the same query: it is computed once, and keeps every name. Each call that adds something begins
        new shards, so that few large calls make better parts than many small ones.

        ids: [N, 0..2^64-1]. names: printable text [N].

        Returns how many pairs of id and name were new. Raises TypeError or ValueError naming the argument.
        """
        return self.manifest.add(ids, names)

    def add_groups(self, groups: Mapping[str, str]) -> int:
        """Add groups behind those that are there, which leaves only their cells to compute.

        groups: hashes of deltas by name; of a group that is there it must be the same.

        Returns how many were new. Raises ValueError where the store is closed, or a hash is another one.
        """
        _check_groups("add_groups", groups)
        if self.closed and any(name not in self.groups for name in groups):
            raise ValueError(
                f"{self.path}: must not be a store of a race where groups are added, whose cells would differ"
            )
        return self._groups.add(groups)

    def claim(self, shard: Shard, owner: str, seconds: float) -> Lease | None:
        """Take a shard for a while, so that others work on something else meanwhile.

        A lease saves work and nothing depends on it: two that compute one shard get the same part. It ends when it is
        released, or ``seconds`` after it was made or renewed by the clock of the file system, whatever the clocks of
        the machines say; if that clock is set back by more, at once.

        owner: who asks, for ``guda-fast store inspect``. seconds: longer than a shard takes, or than the time between
            two calls of ``Lease.renew`` [> 0].

        Returns the Lease, or None where another one has the shard or it is finished.
        """
        seconds = check_real("claim", "seconds", seconds, 1e-3)
        lease = None if self.finished(shard) else leases.claim(self.claims_folder, shard, owner, seconds)
        if lease is not None and self.finished(shard):  # by the one whose lease ended between the two lines
            lease.release()
            return None
        return lease

    def leases(self) -> list[tuple[Shard, str]]:
        """The shards that are being computed, with those who have the leases.

        The lease of a finished shard, as of a process that was killed before it could release it, is not one of them.
        """
        return [(shard, owner) for shard, owner in leases.active(self.claims_folder) if not self.finished(shard)]

    def revoke(self, owner: str) -> None:
        """End all leases of an owner that is known to be gone, as a process that was killed."""
        leases.revoke(self.claims_folder, owner)

    def finished(self, shard: Shard) -> bool:
        """Whether the shard has its part, or was there for the last call of ``missing`` already."""
        return self.part_path(shard).exists() or shard in self._cover

    def write(self, shard: Shard, result: Attribution | None) -> bool:
        """Publish the cells of a shard: the file appears whole and on the disk, or not at all.

        shard: one of ``shards()``.
        result: scores of at least its queries, joined by id, under at least its groups; where its provenance has what
            the settings have, that is compared. A query may be missing that has a failure with its id; None where all
            have.

        Returns False where the shard was finished already, by whoever: this result is dropped then.
        Raises ValueError naming what does not belong; OSError where the disk is full, with nothing left behind.
        """
        if shard not in self._known():
            raise ValueError(f"write: shard must be one of the store's, got {shard}")
        ids, _ = self.manifest.distinct(shard.queries)
        row = {} if result is None else {number: index for index, number in enumerate(result.query_ids)}
        rows = np.array([row.get(number, -1) for number in ids.tolist()])
        absent = set(ids[rows < 0].tolist())
        if absent:
            absent -= {failure.query_id for failure in self.failures()}
        if absent:
            raise ValueError(f"write: result must have every query of {shard.name}, got none with id {min(absent)}")
        if result is None:
            columns = [name for name in COLUMNS if name not in OPTIONAL]
            empty = Block.empty(len(shard.queries), len(shard.groups), columns)
            return self.publish(shard, [Piece(shard.queries, empty, frozenset())])
        self._check_result(shard, result)
        block = Block.of(result, rows, [result.groups.index(name) for name in self.group_names(shard)])
        return self.publish(shard, [Piece(shard.queries, block, frozenset([result.std_error_kind]))])

    def publish(self, shard: Shard, found: Iterable[Piece]) -> bool:
        """Write the part of a shard, or of several together, from successive pieces with its groups only.

        Returns False where there is a file of that name. ``write`` is for results, and checks them.
        """
        if self.part_path(shard).exists():
            return False
        labelled = ((*self.manifest.distinct(piece.rows), piece) for piece in found)
        data = encode(shard, labelled, self.group_names(shard), run=self.digest)
        self.parts_folder.mkdir(exist_ok=True)
        return create_file(self.part_path(shard), data)

    def _check_result(self, shard: Shard, result: Attribution) -> None:
        """Raise ValueError where a result lacks groups of the shard, or is of other settings."""
        names, provenance = self.group_names(shard), result.provenance
        lacking = [name for name in names if name not in result.groups]
        if lacking:
            raise ValueError(f"write: result must have the groups of {shard.name}, got none named {lacking[0]!r}")
        shared = [name for name in COMPARED if name in provenance and name in self.settings]
        hashes = provenance.get("delta_hashes") or {}
        stored: dict[str, Any] = {name: self.settings[name] for name in shared}
        given: dict[str, Any] = {name: provenance[name] for name in shared}
        stored["groups"] = {name: self.groups[name] for name in names if name in hashes}
        given["groups"] = {name: hashes[name] for name in names if name in hashes}
        self._refuse("write: result must be of the store's settings, got", stored, given)

    def _refuse(self, message: str, stored: Any, given: Any) -> None:
        found = list(differences(stored, json_values("Store", "settings", given)))
        if found:
            raise ValueError("\n  ".join([message, *found]))

    def record_failure(self, query: str, reason: str, query_id: int | None = None) -> None:
        """Keep why a query has no scores, as a broken image; a second call for the same name replaces the first.

        query_id: of a query that is in the store, whose shard can then be written without it.
        """
        failures.record(self._failures, Failure(query, reason, query_id))

    def failures(self) -> list[Failure]:
        """The queries that were recorded with ``record_failure``, by name."""
        return failures.failures(self._failures)

    def forget_failures(self) -> list[Failure]:
        """Remove all failures, and the parts that lack a query because of one, so that these are tried again.

        Returns what was removed.
        """
        found = self.failures()
        ids = np.array([failure.query_id for failure in found if failure.query_id is not None], dtype=np.uint64)
        rows = np.flatnonzero(np.isin(self.manifest.ids[self.manifest.first], ids)).tolist()
        for shard in self.parts():
            if any(row in shard.queries for row in rows):
                self.part_path(shard).unlink(missing_ok=True)
        failures.forget(self._failures)
        return found

    def verify(self) -> Iterator[Damage]:
        """Read every byte, and yield each file that is not what was written, with what was found.

        Found are flipped bits anywhere in a part or a manifest, parts that are cut off, of other settings, or in
        another's place, and files that are no parts. A damaged run.json is found by ``open``.
        """
        return upkeep.damages(self)

    def drop(self, damage: Damage) -> None:
        """Remove a damaged part, so that its cells are missing and computed again.

        Raises ValueError for what is not ``mendable``: a manifest, without which nobody knows what parts are of, and
        files that are no parts.
        """
        upkeep.drop(damage)

    def clean(self, *, age: float = 3600.0) -> list[Path]:
        """Remove temporary files that killed processes left, and leases that are over.

        age: in seconds, by the clock of the file system: younger files may still be written [>= 0].

        Returns what was removed.
        """
        return upkeep.clean(self, check_real("clean", "age", age, 0.0))

    def compact(self) -> tuple[int, int]:
        """Write large parts in the place of many small ones, which are then removed.

        A finished store gets the same parts whatever it was made of: additions, merges, repairs. Queries that are
        not finished stay as they are. Killed at any moment it leaves all cells, some in two parts, of which reading
        takes one and the next call removes the other. Who reads meanwhile may find a part gone, and reads again.

        Returns how many parts were written, and how many removed.
        """
        return upkeep.compact(self)

    def merge(self, other: Store) -> int:
        """Add the queries, groups and failures of another store of the same settings, and copy its cells.

        Shards of which it has some cells only are left to compute, as are those that are damaged there: ValueError
        names the part. What was copied before stays.

        Returns how many shards were written. Raises ValueError where settings or deltas differ.
        """
        return upkeep.merge(self, other)


def _check_groups(where: str, groups: Mapping[str, str]) -> None:
    if not isinstance(groups, Mapping):
        raise TypeError(f"{where}: groups must be hashes by name, got {describe(groups)}")
    if not groups:
        raise ValueError(f"{where}: groups must be at least one, got none")
    for name, number in groups.items():
        if not (isinstance(name, str) and name and name.isprintable() and isinstance(number, str)):
            raise TypeError(f"{where}: groups must be hashes by printable name, got {describe((name, number))}")
