"""Racing against the full protocol through `attribute`, from queries to results, on a real bank."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.contenders import architecture
from benchmarks.registry import Case, Contender
from guda_fast import Attribution, DeltaBank, Protocol, attribute
from guda_fast.cli.named import sources_in
from guda_fast.estimators import Full, Racing


def wall_time_case(base: Path, models: Path, queries: Path, most: int | None, confidence: float) -> Case:
    """One folder of models: all cells exactly, then racing with its pilot, which nothing is known for beforehand."""
    bank = DeltaBank.load(base, sources_in(models, {}, "MODELS"))
    protocol = Protocol.from_scheduler(base / "scheduler", start=10, stride=10)
    files = sorted(queries.glob("*.png"))[:most]

    def score(estimator: Full | Racing) -> Attribution:
        return attribute(files, bank, protocol, estimator=estimator)

    def check() -> None:
        top = [
            np.asarray(score(estimator).scores).argmax(axis=1) for estimator in (Full(), Racing(confidence=confidence))
        ]
        # Each query may be wrong with 1 - confidence: five deviations more would be another fault.
        allowed = len(files) * (1 - confidence)
        assert (top[0] != top[1]).sum() <= allowed + 5 * np.sqrt(allowed)

    return Case(
        op="attribute",
        shapes=f"{models.name}, N={len(files)} K={len(bank)} D={protocol.draws}",
        dtype="float32",
        bytes=0,
        input_sets=1,
        rival=Contender("Full", architecture(), lambda _: score(Full())),
        contenders=[
            Contender(f"Racing {confidence:g}", architecture(), lambda _: score(Racing(confidence=confidence)))
        ],
        check=check,
    )
