"""Attribution: the scores of all cells, and their way into files and tables."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guda_fast._files import atomic_write
from guda_fast._validate import check_int, describe
from guda_fast.diffusion.schedule import FloatArray

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


SCORES = "scores.parquet"
WIDE = "scores.csv"
RECORD = "run.json"
CONTROLS = "controls.parquet"
"""Beside SCORES: the scores of the control groups that gave its p-values."""
COLUMNS = ("query_id", "query", "group", "score", "std_error", "draws", "exact", "error_base", "error_group")
P_VALUE = "p_value"
"""A further column of results that were compared with control groups."""


class RankedGroup(NamedTuple):
    """One of a query's top groups."""

    group: str
    score: float
    std_error: float
    p_value: float = math.nan


@dataclass(frozen=True, eq=False)
class Attribution:
    """Scores of N queries under K groups: by how much each query's ELBO drops without the group.

    queries: names [N]. query_ids: [N, 0..2^64-1]. groups: names [K].
    scores: positive where the group mattered, in nats for the elbo weightings [(N, K), float64].
    std_error: [(N, K), float64; NaN where unknown]. std_error_kind: how it was estimated.
    draws: draws behind each cell. error_base: weighted errors of the base, summed over draws [(N,), float64].
    base_errors: the same by draw [(N, D), float64; None when read from a file].
    p_value: against control groups, see ``with_p_values`` [(N, K), float64, above 0 to 1; None without them].
    provenance: what the scores depend on (hashes, protocol, precision, versions), as JSON values.
    """

    queries: tuple[str, ...]
    query_ids: tuple[int, ...]
    groups: tuple[str, ...]
    scores: FloatArray
    std_error: FloatArray
    std_error_kind: str
    draws: int
    error_base: FloatArray
    base_errors: FloatArray | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    p_value: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.queries)

    def __repr__(self) -> str:
        return f"Attribution({len(self)} queries x {len(self.groups)} groups, {self.draws} draws a cell)"

    def same_run(self, provenance: Mapping[str, Any], query_ids: Sequence[int]) -> bool:
        """Whether these are the scores of such queries under such models and draws, however they were executed."""
        exact = ("base_hash", "delta_hashes", "protocol", "precision", "conditions", "latents")
        return self.query_ids == tuple(query_ids) and all(
            self.provenance.get(key) == provenance.get(key) for key in exact
        )

    def top(self, count: int = 1) -> list[list[RankedGroup]]:
        """Each query's ``count`` highest groups, best first; of equal scores the lower group index first."""
        check_int("top", "count", count, 1, len(self.groups))
        order = np.argsort(-self.scores, axis=1, kind="stable")[:, :count]
        p_value = np.full(self.scores.shape, np.nan) if self.p_value is None else self.p_value
        return [
            [
                RankedGroup(self.groups[k], float(self.scores[i, k]), float(self.std_error[i, k]), float(p_value[i, k]))
                for k in row
            ]
            for i, row in enumerate(order)
        ]

    def select(self, groups: Sequence[str]) -> Attribution:
        """The same result for some of its groups, in the given order; ValueError naming those that it has not."""
        index = _columns("select", "groups", groups, self.groups)
        hashes = self.provenance.get("delta_hashes")
        kept = {} if hashes is None else {"delta_hashes": {group: hashes.get(group) for group in groups}}
        return replace(
            self,
            groups=tuple(groups),
            scores=self.scores[:, index],
            std_error=self.std_error[:, index],
            p_value=None if self.p_value is None else self.p_value[:, index],
            provenance={**self.provenance, **kept},
        )

    def p_values(self, controls: Sequence[str] | Attribution) -> FloatArray:
        """How often a random set of images would score as high as each group.

            p_ik = (1 + #{controls c: score_ic >= score_ik}) / (1 + M)

        one-sided, for each query by itself. The null: group k is exchangeable with the M control groups, random subsets
        of the data of its size whose counterfactuals were made the same way. The smallest p is 1 / (1 + M), and no
        correction for the number of groups or queries is made.

        controls: names of control groups among these groups, or scores of control groups for the same queries, joined
            by query id, under the same base and protocol [M >= 1, none by the name or with the delta of a group]

        Returns p for every group that is no control, in the order of ``groups`` [(N, K), float64, above 0 to 1].
        Raises TypeError or ValueError where a name, a query or a score is missing, or base or protocol is another one.
        Source: Davison and Hinkley 1997, section 4.2 (Monte Carlo tests).

        >>> result.p_values([name for name in result.groups if name.startswith("control-")])  # doctest: +SKIP
        """
        return self._against(controls)[1]

    def with_p_values(self, controls: Sequence[str] | Attribution) -> Attribution:
        """The same result with the ``p_values`` of its cells, and without the groups that are controls."""
        groups, p_value = self._against(controls)
        null = controls if isinstance(controls, Attribution) else self.select(controls)
        entries: dict[str, Any] = {"controls": list(null.groups)}
        if "delta_hashes" in null.provenance:
            entries["control_hashes"] = null.provenance["delta_hashes"]
        return replace(self.select(groups), p_value=p_value).with_provenance(**entries)

    def _against(self, controls: Sequence[str] | Attribution) -> tuple[tuple[str, ...], FloatArray]:
        """The groups that are no controls, and their p-values."""
        if isinstance(controls, Attribution):
            _check_apart(self, controls)
            groups, null = self.groups, controls.scores[_rows(self, controls)]
        else:
            names = tuple(controls) if not isinstance(controls, str) else controls
            null = self.scores[:, _columns("p_values", "controls", names, self.groups)]
            groups = tuple(group for group in self.groups if group not in names)
        scores = self.scores[:, [self.groups.index(group) for group in groups]]
        for what, values in (("scores", scores), ("controls", null)):
            if values.shape[1] == 0:
                raise ValueError(f"p_values: {what} must be of at least one group, got none")
            if not np.isfinite(values).all():
                raise ValueError(f"p_values: {what} must be finite, got NaN or infinity")
        count = null.shape[1]
        below = [np.searchsorted(row, cells, side="left") for row, cells in zip(np.sort(null), scores, strict=True)]
        reached = count - np.reshape(below, scores.shape)
        p_value: FloatArray = (1.0 + reached) / (1.0 + count)
        return groups, p_value

    @classmethod
    def from_parquet(cls, path: str | os.PathLike[str]) -> Attribution:
        """Read what ``to_parquet`` wrote: the file, or the folder that holds scores.parquet.

        Raises FileNotFoundError, or ValueError naming the file when it is damaged or no result of guda_fast.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = Path(path) / SCORES if Path(path).is_dir() else Path(path)
        data = file.read_bytes()  # so that below OSError can only mean damaged content
        try:
            # pyarrow's threads would outlive the interpreter that owns these bytes.
            table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
            record = json.loads((table.schema.metadata or {})[b"guda_fast"])
            count, groups, kind = (record.pop(key) for key in ("queries", "groups", "std_error_kind"))
            names = (*COLUMNS, *(name for name in (P_VALUE,) if name in table.column_names))
            columns = {name: table[name].to_numpy().reshape(count, len(groups)) for name in names}
            _check_order(columns, groups)
        except (pa.ArrowException, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file}: must be scores written by guda_fast, found {error}") from error
        return cls(
            queries=tuple(columns["query"][:, 0]),
            query_ids=tuple(columns["query_id"][:, 0].tolist()),
            groups=tuple(groups),
            scores=columns["score"].copy(),
            std_error=columns["std_error"].copy(),
            std_error_kind=kind,
            draws=int(columns["draws"].flat[0]),
            error_base=columns["error_base"][:, 0].copy(),
            provenance=record,
            p_value=columns[P_VALUE].copy() if P_VALUE in columns else None,
        )

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> Attribution:
        """Read a wide CSV, as ``to_csv`` writes, or of another method: query, query_id, then a score a group.

        Empty lines are skipped. What it does not say is unknown: standard errors and the base's errors are NaN, and
        ``draws`` is 0.

        Raises OSError as `open`, or ValueError naming the file and the line where it holds something else.
        """
        with open(path, encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            try:
                rows = list(csv.reader(file, strict=True))
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{path}: must be CSV in UTF-8, found a damaged file ({error})") from error
        header, *lines = rows or [[]]
        groups = tuple(header[2:])
        if header[:2] != ["query", "query_id"] or not groups or len(set(groups)) < len(groups):
            raise ValueError(f"{path}: must begin with query, query_id and distinct groups, found {describe(header)}")
        names, ids, scores = [], [], []
        for number, line in enumerate(lines, 2):
            if not line:
                continue
            try:
                names.append(line[0])
                ids.append(check_int("query", "id", int(line[1]), 0, 2**64 - 1))
                scores.append([float(score) for _, score in zip(groups, line[2:], strict=True)])
            except (IndexError, ValueError) as error:
                wanted = f"a query, its id and {len(groups)} scores"
                raise ValueError(f"{path}, row {number}: must have {wanted}, found {describe(line)}") from error
        matrix = np.array(scores, dtype=np.float64).reshape(len(ids), len(groups))
        unknown = np.full(matrix.shape, np.nan)
        return cls(tuple(names), tuple(ids), groups, matrix, unknown, "none", 0, np.full(len(ids), np.nan))

    def to_arrow(self) -> pa.Table:
        """One row a cell, queries outermost, with the provenance as JSON under the metadata key ``guda_fast``."""
        import pyarrow as pa

        count, groups = self.scores.shape
        base = np.repeat(self.error_base, groups)
        scores = self.scores.ravel()
        ids = np.array(self.query_ids, dtype=np.uint64)
        columns = (
            np.repeat(ids, groups),
            np.repeat(np.array(self.queries, dtype=object), groups),
            np.tile(np.array(self.groups, dtype=object), count),
            scores,
            self.std_error.ravel(),
            np.full(scores.shape, self.draws, dtype=np.int32),
            np.ones(scores.shape, dtype=bool),
            base,
            base + scores,
        )
        table = pa.table(dict(zip(COLUMNS, columns, strict=True)))
        if self.p_value is not None:
            table = table.append_column(P_VALUE, pa.array(self.p_value.ravel()))
        return table.replace_schema_metadata({"guda_fast": json.dumps(self.record())})

    def record(self) -> dict[str, Any]:
        """The provenance with the shape of the result, as JSON values: what run.json holds."""
        return {
            **self.provenance,
            "queries": len(self),
            "groups": list(self.groups),
            "std_error_kind": self.std_error_kind,
        }

    def with_provenance(self, **entries: Any) -> Attribution:
        """The same scores with more provenance entries (JSON values)."""
        return replace(self, provenance={**self.provenance, **entries})

    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Write the cells as Parquet: to ``path`` itself if it ends in .parquet, else to ``path``/scores.parquet
        with ``path``/run.json beside it. Each file appears whole or not at all. Returns the Parquet file."""
        import pyarrow.parquet as pq

        target = Path(path)
        file = target if target.suffix == ".parquet" else target / SCORES
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file, "wb") as stream:
            pq.write_table(self.to_arrow(), stream)
        if file != target:
            with atomic_write(target / RECORD, "w") as text:
                text.write(json.dumps(self.record(), indent=2) + "\n")
        return file

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a wide CSV, one row a query: query, query_id, then a score a group with all digits."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "w") as stream:
            writer = csv.writer(stream)
            writer.writerow(["query", "query_id", *self.groups])
            for name, number, row in zip(self.queries, self.query_ids, self.scores.tolist(), strict=True):
                writer.writerow([name, number, *map(repr, row)])

    def to_pandas(self) -> pd.DataFrame:
        """The columns of ``to_arrow`` as a data frame. Raises ImportError naming the extra without pandas."""
        try:
            import pandas  # noqa: F401 (pyarrow needs it, and says less about how to get it)
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install 'guda_fast[pandas]'") from error
        frame: pd.DataFrame = self.to_arrow().to_pandas()
        return frame


def _columns(where: str, name: str, groups: Sequence[str], known: tuple[str, ...]) -> list[int]:
    """Where each of the groups is among the known ones."""
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise TypeError(f"{where}: {name} must be a sequence of group names, got {describe(groups)}")
    if len(set(groups)) != len(groups):
        raise ValueError(f"{where}: {name} must be distinct, got {describe(tuple(groups))}")
    for group in groups:
        if group not in known:
            raise ValueError(f"{where}: {name} must be among {', '.join(known)}, got {describe(group)}")
    return [known.index(group) for group in groups]


def _check_apart(result: Attribution, controls: Attribution) -> None:
    """Raise ValueError where a control is one of the result's groups: a group is no null for itself or the others."""
    hashes = result.provenance.get("delta_hashes") or {}
    group_of = {number: group for group, number in hashes.items() if number is not None}
    found = controls.provenance.get("delta_hashes") or {}
    for name in controls.groups:
        if name in result.groups:
            raise ValueError(f"p_values: controls must not be groups of the scores, got {describe(name)}")
        if found.get(name) in group_of:
            same = describe(group_of[found[name]])
            raise ValueError(
                f"p_values: controls must not be groups of the scores, got {describe(name)}, which is {same}"
            )


def _rows(result: Attribution, controls: Attribution) -> list[int]:
    """The row of the controls' scores of each query of a result, after a look at what both were computed with."""
    for key in ("base_hash", "protocol"):
        wanted, found = result.provenance.get(key), controls.provenance.get(key)
        if None not in (wanted, found) and wanted != found:
            raise ValueError(f"p_values: controls must have the same {key} as the scores, got {describe(found)}")
    rows = {number: row for row, number in enumerate(controls.query_ids)}
    missing = [name for name, number in zip(result.queries, result.query_ids, strict=True) if number not in rows]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"p_values: controls must have scores for every query, got none for {missing[0]}{more}")
    return [rows[number] for number in result.query_ids]


def _check_order(columns: Mapping[str, NDArray[Any]], groups: Sequence[str]) -> None:
    """That rows are in the order in which they were written: a file that was sorted would give other scores."""
    ids = columns["query_id"]
    if (columns["group"] != np.array(groups, dtype=object)).any() or (ids != ids[:, :1]).any():
        raise ValueError("its rows in another order than they were written in")
