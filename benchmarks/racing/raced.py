"""Racing on arrays of differences, beside its rivals."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.racing.cases import Case
from benchmarks.racing.rivals import IntArray, Outcome
from guda_fast.estimators import ArrayDifferences, Cells, Racing, Tree

PILOT = 16


@dataclass(frozen=True)
class Raced:
    """A race that knows nothing beforehand: its pilot is paid for."""

    confidence: float
    pilot: int = PILOT
    name = "racing"
    random = True

    @property
    def setting(self) -> str:
        return f"confidence {self.confidence:g}"

    def run(self, case: Case, seed: int) -> Outcome:
        source = ArrayDifferences(case.differences)
        return Outcome(case.best(self._race(case, source, seed).scores), source.forwards)

    def cells(self, case: Case, seed: int) -> Cells:
        """All that the race says."""
        return self._race(case, ArrayDifferences(case.differences), seed)

    def _race(self, case: Case, source: ArrayDifferences, seed: int) -> Cells:
        racing = Racing(confidence=self.confidence, pilot=self.pilot, seed=seed)
        if case.parent is None:
            return racing.replay(source, candidates=case.candidates)
        names = [str(group) for group in range(source.groups)]
        children = {
            names[parent]: [names[case.parents + child] for child in np.flatnonzero(case.parent == parent)]
            for parent in range(case.parents)
        }
        return Tree(children, racing).replay(source, names)


@dataclass(frozen=True)
class Stored:
    """A race with a pilot that was paid for before: each half of the queries with one of the other half."""

    confidence: float
    pilot: int = PILOT
    name = "racing, stored pilot"
    random = True

    @property
    def setting(self) -> str:
        return f"confidence {self.confidence:g}"

    def run(self, case: Case, seed: int) -> Outcome:
        halves = np.array_split(np.random.default_rng(seed).permutation(len(case.differences)), 2)
        top: IntArray = np.empty(len(case.differences), dtype=np.int64)
        forwards = 0
        for own, other in (halves, halves[::-1]):
            with tempfile.TemporaryDirectory() as folder:
                racing = Racing(
                    confidence=self.confidence,
                    pilot=self.pilot,
                    seed=seed,
                    pilot_file=Path(folder) / "pilot.safetensors",
                )
                racing.replay(_part(case, other))
                source = _part(case, own)
                top[own] = case.best(racing.replay(source).scores)
                forwards += source.forwards
        return Outcome(top, forwards)


def _part(case: Case, queries: IntArray) -> ArrayDifferences:
    return ArrayDifferences(case.differences[queries], ids=queries.tolist())
