"""Agreement against cost: each contender at each of its settings, on the same queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from benchmarks.racing.cases import Case
from benchmarks.racing.raced import Raced, Stored
from benchmarks.racing.rivals import Contender, IntArray, Outcome, settings
from benchmarks.racing.rows import share

COLUMNS = (
    *("case", "contender", "setting", "seeds", "queries", "groups", "draws", "decisions", "wrong"),
    *("share", "low", "high", "forwards", "cost", "saving"),
)
CONFIDENCES = (0.5, 0.9, 0.99, 0.999)
STORED = (0.9, 0.99)


def ours(case: Case) -> Iterator[Raced | Stored]:
    """Racing as it comes, and with a pilot of other queries."""
    for confidence in CONFIDENCES:
        yield Raced(confidence)
    if case.parent is None and case.candidates is None:
        for confidence in STORED:
            yield Stored(confidence)


def rows_of(case: Case, seeds: int) -> Iterator[Mapping[str, object]]:
    """A row a setting. Decisions of several seeds are of the same queries, so that the bounds are a little narrow."""
    for contender in [*ours(case), *settings(case.differences.shape[2])]:
        asked = range(seeds if contender.random else 1)
        found = [on(case, contender, seed) for seed in asked]
        wrong = sum(int((one.top != case.top).sum()) for one in found)
        forwards = float(np.mean([one.forwards for one in found]))
        queries, groups, draws = case.differences.shape
        decisions = queries * len(found)
        yield {
            "case": case.name,
            "contender": contender.name,
            "setting": contender.setting,
            "seeds": len(found),
            "queries": queries,
            "groups": groups - case.parents,
            "draws": draws,
            "decisions": decisions,
            "wrong": wrong,
            **share(decisions - wrong, decisions),
            "forwards": round(forwards),
            "cost": f"{forwards / case.full:.5f}",
            "saving": f"{case.full / forwards:.2f}",
        }


def on(case: Case, contender: Contender | Raced | Stored, seed: int) -> Outcome:
    """Rivals know candidates, whose number is that of every query, but no trees."""
    if isinstance(contender, Raced | Stored):
        return contender.run(case, seed)
    if case.candidates is None:
        found = contender.run(case.differences[:, case.parents :], seed)
        return Outcome(found.top + case.parents, found.forwards)
    kept: IntArray = np.nonzero(case.candidates)[1].reshape(len(case.candidates), -1)
    found = contender.run(np.take_along_axis(case.differences, kept[:, :, None], axis=1), seed)
    return Outcome(np.take_along_axis(kept, found.top[:, None], axis=1)[:, 0], found.forwards)


def edge(rows: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """Rivals that got more queries right for no more forwards than a setting of racing, as sentences."""
    for row in rows:
        if row["contender"] != "racing":
            continue
        for other in rows:
            beaten = float(str(other["share"])) > float(str(row["share"])) and float(str(other["cost"])) <= float(
                str(row["cost"])
            )
            if beaten and other["case"] == row["case"] and not str(other["contender"]).startswith(("racing", "budget")):
                yield (
                    f"{row['case']}: racing {row['setting']} ({row['share']} at {row['cost']}) is inside of "
                    f"{other['contender']} {other['setting']} ({other['share']} at {other['cost']})"
                )
