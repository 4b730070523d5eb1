"""Everything that can be said of methods beside an oracle, as one Markdown text, tables in CSV and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from guda_fast._files import atomic_write
from guda_fast.evaluation.agreement_figure import agreement_figure
from guda_fast.evaluation.confusion import Confusion, confusion, write_confusions
from guda_fast.evaluation.metrics import FloatArray
from guda_fast.evaluation.significance import SignificanceTable
from guda_fast.evaluation.table import FLOOR, REFERENCES, AgreementTable, agreement, linear_agreement

REPORT, AGREEMENT, GAPS, CONFUSION, SIGNIFICANCE, FIGURE = (
    "evaluation.md",
    "agreement.csv",
    "gaps.csv",
    "confusion.csv",
    "significance.csv",
    "agreement.png",
)
ORACLE = "the oracle"
"""The row of the LDS of the mean of the oracle's seeds."""
_GAPS = (
    f"Each method's value less that of {FLOOR}, query by query. All queries share the models of a training seed, "
    "and the intervals know of queries only: one without 0 does not show that the method agrees less, or more, "
    "than another seed of the oracle would."
)


@dataclass(frozen=True)
class Options:
    """How agreement is measured; see ``agreement``. metrics None: all, top-3 and NDCG@3 at most as deep as groups."""

    metrics: Sequence[str] | None = None
    gain: str = "exponential"
    reference: str = "leave-one-out"
    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Subsets:
    """Models retrained without several groups: their scores [(N, J)], and which groups each lacks [(J, K), bool]."""

    outcomes: FloatArray
    removed: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Methods beside an oracle.

    agreement: the metrics, with the oracle's own noise and random rankings as rows. confusions: of each method.
    linear: LDS, where subsets were given. significance: of methods with p-values. notes: what a reader must know.
    """

    agreement: AgreementTable
    confusions: Mapping[str, Confusion]
    linear: AgreementTable | None = None
    significance: SignificanceTable | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    def to_markdown(self) -> str:
        """All tables with their headings."""
        parts = [f"# Agreement with the oracle\n\n{self.agreement.to_wide_markdown()}"]
        if self.agreement.seeds == 1:
            parts.append(
                "The oracle's own noise is not known: it takes scores of the oracle with another training seed.\n"
            )
        else:
            gaps = replace(self.agreement, rows=self.agreement.gaps, reference=REFERENCES[0]).to_wide_markdown()
            parts.append(f"## Less the oracle's own agreement\n\n{_GAPS}\n\n{gaps}")
        if self.linear is not None:
            parts.append(f"## Linear datamodelling score\n\n{self.linear.to_wide_markdown()}")
        if self.significance is not None:
            parts.append(f"## Against control groups\n\n{self.significance.to_markdown()}")
        if self.agreement.seeds > 1:
            parts.append(
                f"The tables below are of the mean of the oracle's {self.agreement.seeds} seeds{self._unlike}.\n"
            )
        for method, found in self.confusions.items():
            parts.append(f"## Top groups of {method}\n\n{found.to_markdown()}")
        if self.notes:
            parts.append("## Notes\n\n" + "".join(f"* {note}\n" for note in self.notes))
        return "\n".join(parts)

    @property
    def _unlike(self) -> str:
        same = self.agreement.reference != REFERENCES[0]
        return "" if same else ", the first table of the seeds less one, so that their shares need not be its top-1"

    def write(self, folder: Path) -> None:
        """Write REPORT, AGREEMENT, CONFUSION, FIGURE, and what there is of GAPS and SIGNIFICANCE into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = self.agreement.rows + (() if self.linear is None else self.linear.rows)
        replace(self.agreement, rows=rows).to_csv(folder / AGREEMENT)
        write_confusions(folder / CONFUSION, self.confusions)
        for name in (GAPS, SIGNIFICANCE):
            (folder / name).unlink(missing_ok=True)  # of a report that this one replaces
        if self.agreement.gaps:
            replace(self.agreement, rows=self.agreement.gaps).to_csv(folder / GAPS)
        if self.significance is not None:
            self.significance.to_csv(folder / SIGNIFICANCE)
        agreement_figure(self.agreement, folder / FIGURE)
        with atomic_write(folder / REPORT, "w") as file:
            file.write(self.to_markdown())


def evaluate(
    groups: Sequence[str],
    methods: Mapping[str, FloatArray],
    oracles: Sequence[FloatArray],
    *,
    options: Options | None = None,
    subsets: Subsets | None = None,
    significance: SignificanceTable | None = None,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Compare methods with an oracle by all metrics, and count their top groups.

    Confusions are with the mean of the oracle's seeds.

    groups: names [K]
    methods: scores by method [(N, K), real and finite, N >= 1, K >= 2]
    oracles: scores of the oracle, of one training seed or several [(N, K) each]
    options: how agreement is measured
    subsets: models retrained without several groups, for the LDS
    significance, notes: go into the report as they are
    Returns: the ``Evaluation``
    Raises: TypeError, ValueError for other arguments
    """
    options = options or Options()
    if ORACLE in methods:
        raise ValueError(f"evaluate: a method must have a name other than {ORACLE!r}, got one of that name")
    names = _default_metrics(len(groups)) if options.metrics is None else options.metrics
    bootstrap: dict[str, Any] = {"seed": options.seed, "confidence": options.confidence, "resamples": options.resamples}
    first, *others = oracles
    table = agreement(
        methods,
        first,
        others=others,
        reference=options.reference,
        metrics=names,
        gain=options.gain,
        **bootstrap,
    )
    mean = np.mean(oracles, axis=0)
    linear = None
    if subsets is not None:
        scored = {**methods, ORACLE: mean}
        linear = linear_agreement(scored, subsets.outcomes, subsets.removed, **bootstrap)
    confusions = {method: confusion(groups, matrix, mean) for method, matrix in methods.items()}
    return Evaluation(table, confusions, linear, significance, tuple(notes))


def _default_metrics(groups: int) -> list[str]:
    depth = min(3, groups)
    return ["top-1", f"top-{depth}", "MRR", f"NDCG@{depth}", "RBO", "Spearman", "Kendall"]
