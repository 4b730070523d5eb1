"""Racing: the top groups of the exact protocol, with a stated confidence, at a fraction of its forwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guda_fast._validate import check_choice, check_int, check_real, describe
from guda_fast.datasets.queries import QuerySet
from guda_fast.deltas import DeltaBank
from guda_fast.diffusion import Protocol
from guda_fast.diffusion.schedule import FloatArray
from guda_fast.estimators.cells import Cells, considered, standard_error, std_error_kind
from guda_fast.estimators.design import looks
from guda_fast.estimators.differences import BoolArray, Differences, EngineDifferences, IntArray
from guda_fast.estimators.field import Field, White
from guda_fast.estimators.full import tiles
from guda_fast.estimators.gather import choose, gather
from guda_fast.estimators.pilot import LEAST, Pilot
from guda_fast.estimators.race import Finish, run_race
from guda_fast.forward import Advance, Engine

Report = Callable[[int, int], None]
"""Called with (cells that still race, cells of the tile) after every look."""

_BYTES_A_DRAW = 64  # of a cell: its difference, the white one, and copies while they are compared


@dataclass(frozen=True)
class Racing:
    """Draws in the order that tells most; a group that is surely behind is dropped. See docs/racing.md.

    top: how many groups are wanted: their set, not the order within it [>= 1].
    confidence: that they are those of the exact protocol, for each query, under a model that is checked on the pilot
        [0..1; 1: nothing is dropped, and everything is exact].
    max_draws: of a query at most, which may leave it below the confidence [>= 1; all by default].
    min_draws: of every cell [>= 1].
    pilot: queries that are evaluated fully, and taught from [>= 8], or a pilot of an earlier run.
    finalists: "estimate", or "exact": the top groups get all their draws.
    seed: of the choice of the pilot [>= 0].
    tile_bytes: memory for the queries that race together and their cells [>= 1].
    pilot_file: the pilot is read from it where it is there, and else written to it.

    With fewer queries than 8, no more groups than ``top``, or confidence 1, all draws are evaluated.
    """

    top: int = 1
    confidence: float = 0.99
    max_draws: int | None = None
    min_draws: int = 2
    pilot: int | Pilot = 16
    finalists: str = "estimate"
    seed: int = 0
    tile_bytes: int = 2**28
    pilot_file: Path | None = None

    def __post_init__(self) -> None:
        check_int("Racing", "top", self.top, 1)
        check_real("Racing", "confidence", self.confidence, 0.0)
        if self.confidence > 1:
            raise ValueError(f"Racing: confidence must be at most 1, got {self.confidence!r}")
        check_int("Racing", "min_draws", self.min_draws, 1)
        if self.max_draws is not None:
            check_int("Racing", "max_draws", self.max_draws, self.min_draws)
        if not isinstance(self.pilot, Pilot):
            check_int("Racing", "pilot", self.pilot, LEAST)
        check_choice("Racing", "finalists", self.finalists, ("estimate", "exact"))
        check_int("Racing", "seed", self.seed, 0)
        check_int("Racing", "tile_bytes", self.tile_bytes, 1)
        if not (self.pilot_file is None or isinstance(self.pilot_file, Path)):
            raise TypeError(f"Racing: pilot_file must be a Path, got {describe(self.pilot_file)}")

    def forwards(self, queries: int, groups: int, protocol: Protocol) -> int:
        """Forwards of one row each that a run takes at most."""
        return (groups + 1) * queries * protocol.draws

    def least(self, queries: int, groups: int, protocol: Protocol) -> int:
        """Forwards of one row each that a run takes at least: the pilot, and the first look at everything else."""
        if self.confidence == 1 or groups <= self.top or (queries < LEAST and not self._stored):
            return self.forwards(queries, groups, protocol)
        pilot = 0 if self._stored else min(queries, self.pilot if isinstance(self.pilot, int) else 0)
        first = min(self.min_draws, protocol.draws)
        return (groups + 1) * (min(pilot, queries) * protocol.draws + (queries - pilot) * first)

    def run(self, engine: Engine, queries: QuerySet, advance: Advance, candidates: BoolArray | None = None) -> Cells:
        """Scores of the distinct queries; see ``guda_fast.attribute``.

        advance: its attribute ``racing``, where it has one, is called with (cells that race, cells) after every look.
        candidates: the cells that race, at least one a query [(N, K), bool; all by default].
        """
        return self.replay(
            EngineDifferences(engine, queries, advance),
            engine.protocol,
            candidates,
            identity=identity_of(engine.bank, engine.protocol, engine.precision.name),
            report=getattr(advance, "racing", None),
        )

    def replay(
        self,
        source: Differences,
        protocol: Protocol | None = None,
        candidates: BoolArray | None = None,
        *,
        identity: Mapping[str, Any] | None = None,
        report: Report | None = None,
    ) -> Cells:
        """The same from any source of differences; without a protocol the errors of exact cells are unknown."""
        count = len(source.ids)
        run = _Run(self, source, protocol, considered("Racing", candidates, count, source.groups), report)
        pilot = self._pilot(run, {} if identity is None else identity)
        for tile in tiles(count, source.query_bytes + source.groups * source.draws * _BYTES_A_DRAW, self.tile_bytes):
            run.tile(tile, pilot)
        run.describe(pilot)
        return run.cells

    @property
    def _stored(self) -> bool:
        return isinstance(self.pilot, Pilot) or (self.pilot_file is not None and self.pilot_file.exists())

    def _pilot(self, run: _Run, identity: Mapping[str, Any]) -> Pilot | None:
        """The given pilot, or a new one; None where nothing is to decide, or there are too few queries."""
        if self.confidence == 1 or not run.decided.any():
            return None
        if isinstance(self.pilot, Pilot):
            pilot = self.pilot
        elif self.pilot_file is not None and self.pilot_file.exists():
            pilot = Pilot.load(self.pilot_file)
        else:
            chosen = choose(run.considered, run.ids, self.pilot, self.seed)
            if len(chosen) < LEAST:
                return None
            pilot = run.gather(chosen, self.seed, identity)
            if self.pilot_file is not None:
                pilot.save(self.pilot_file)
            return pilot
        pilot.check_identity(identity)
        if len(pilot.design) != run.source.draws:
            raise ValueError(f"Racing: pilot must be of {run.source.draws} draws, got one of {len(pilot.design)}")
        return pilot


def identity_of(bank: DeltaBank, protocol: Protocol, precision: str) -> dict[str, Any]:
    """What a pilot depends on, as JSON values."""
    return {
        "base_hash": bank.base_hash,
        "delta_hashes": bank.delta_hashes,
        "protocol": protocol.to_dict(),
        "precision": precision,
    }


class _Run:
    """One run of a racing estimator: its cells, filled tile by tile."""

    def __init__(
        self,
        settings: Racing,
        source: Differences,
        protocol: Protocol | None,
        considered: BoolArray,
        report: Report | None,
    ) -> None:
        self.settings, self.source, self.protocol, self.considered, self.report = (
            settings,
            source,
            protocol,
            considered,
            report,
        )
        self.ids = np.array(source.ids, dtype=np.uint64)
        self.decided = considered.sum(axis=1) > settings.top
        kind = "none" if protocol is None else std_error_kind(protocol)
        self.cells = Cells.unknown(len(self.ids), source.groups, source.draws, kind, confidence=True)
        self.forwards = 0
        draws = source.draws
        most = draws if settings.max_draws is None else min(draws, settings.max_draws)
        self.looks = (*(n for n in looks(draws, settings.min_draws) if n < most), most)

    def gather(self, chosen: IntArray, seed: int, identity: Mapping[str, Any]) -> Pilot:
        """Evaluate and fit a pilot of these queries."""
        part = self.source.part(chosen)
        field, sample = gather(part, self.considered[chosen], self.ids[chosen], seed)
        self._count(field, part)
        return Pilot.fit(sample, identity)

    def tile(self, tile: IntArray, pilot: Pilot | None) -> None:
        """Race the queries of a tile and keep what is found."""
        part = self.source.part(tile)
        field = Field(self.considered[tile], self.source.draws, part)
        base = self._seed(field, tile, pilot)
        every = np.arange(self.source.draws)
        if pilot is None:
            field.evaluate(np.arange(len(field)), every)
            finish = None
        else:
            field.evaluate(np.flatnonzero(~self.decided[tile][field.query]), every)
            finish = run_race(
                field, pilot.rules(self.looks, self.settings.top, 1 - self.settings.confidence), self.report
            )
            self._finish(field, finish)
        self._count(field, part)
        known = part.base_errors
        self.cells.base_errors[tile] = np.where(np.isnan(known), base, known)
        self._keep(tile, field, finish, pilot)

    def _seed(self, field: Field, tile: IntArray, pilot: Pilot | None) -> FloatArray:
        """Put in what the pilot has evaluated of this tile's cells; returns its base errors."""
        base = np.full((len(tile), self.source.draws), np.nan)
        if pilot is None:
            return base
        place = {int(number): row for row, number in enumerate(self.ids[tile])}
        cell = {(int(q), int(g)): row for row, (q, g) in enumerate(zip(field.query, field.group, strict=True))}
        sample = pilot.sample
        for number, query in enumerate(sample.ids.tolist()):
            row = place.get(query)
            if row is None:
                continue
            base[row] = sample.base_errors[number]
            for own in np.flatnonzero(sample.query == number).tolist():
                found = cell.get((row, int(sample.group[own])))
                if found is not None:
                    field.differences[found] = sample.differences[own]
        return base

    def _finish(self, field: Field, finish: Finish) -> None:
        """Complete the leaders where it is wanted, and where an exact score of another cell could pass them."""
        complete = field.complete
        some = np.bincount(field.query, complete, minlength=field.queries) > 0
        wanted = finish.leader & (some[field.query] | (self.settings.finalists == "exact"))
        field.evaluate(np.flatnonzero(wanted & ~complete), np.arange(self.source.draws))

    def _keep(self, tile: IntArray, field: Field, finish: Finish | None, pilot: Pilot | None) -> None:
        """Scores, errors and claims of a tile."""
        at = (tile[field.query], field.group)
        complete = field.complete
        cells = self.cells
        cells.draws[at] = field.drawn
        cells.exact[at] = complete
        score, error = np.full(len(field), np.nan), np.full(len(field), np.nan)
        score[complete] = field.differences[complete].sum(axis=1)
        if self.protocol is not None and complete.any():
            error[complete] = standard_error(field.differences[complete], self.protocol)
        cells.confidence[tile] = 1.0  # type: ignore[index]
        if pilot is not None and finish is not None:
            some = np.flatnonzero(~complete)
            score[some], error[some] = _estimates(field, some, finish, pilot)
            _below_leaders(field, finish, complete, score)
            open_ = np.bincount(field.query[some], minlength=field.queries) > 0
            cells.confidence[tile[open_]] = 1 - finish.risk[open_]  # type: ignore[index]
        cells.scores[at], cells.std_error[at] = score, error

    def _count(self, field: Field, part: Differences) -> None:
        self.forwards += field.rows + int((~np.isnan(part.base_errors)).sum())

    def describe(self, pilot: Pilot | None) -> None:
        """Say in the cells' details how they were reached."""
        settings = self.settings
        full = (int(self.considered.sum()) + len(self.ids)) * self.source.draws
        entry: dict[str, Any] = {
            "name": "racing",
            "top": settings.top,
            "confidence": settings.confidence,
            "min_draws": settings.min_draws,
            "max_draws": settings.max_draws,
            "finalists": settings.finalists,
            "seed": settings.seed,
            "forwards": self.forwards,
            "forwards_full": full,
            "saving": full / max(self.forwards, 1),
            "pilot": None,
        }
        if pilot is not None:
            entry["pilot"] = pilot.check(self.looks, settings.top, 1 - settings.confidence)
            entry["pilot"]["queries_evaluated"] = pilot.queries
        self.cells.details["estimator"] = entry  # type: ignore[index]


def _estimates(field: Field, cells: IntArray, finish: Finish, pilot: Pilot) -> tuple[FloatArray, FloatArray]:
    """Best linear estimates of single cells after their draws, and their calibrated errors [(cells,) each]."""
    score, error = np.empty(len(cells)), np.empty(len(cells))
    white, drawn = White(field, pilot.cells), finish.drawn[cells]
    for n in np.unique(drawn).tolist():
        at = drawn == n
        own = cells[at]
        white.extend(own, n)
        score[at] = white.estimate[own]
        squares = np.square(white.values[own, :n]).sum(axis=1)
        error[at] = pilot.cell_scale(squares, n, finish.leader[own])
    return score, error


def _below_leaders(field: Field, finish: Finish, complete: BoolArray, score: FloatArray) -> None:
    """Put estimates of cells that lost the race just below the query's last leader, where they are not."""
    leader = np.full(field.queries, np.inf)
    np.minimum.at(leader, field.query[finish.leader], score[finish.leader])
    limit = np.nextafter(leader, -np.inf)[field.query]
    lost = ~finish.leader & ~complete
    score[lost] = np.minimum(score[lost], limit[lost])
