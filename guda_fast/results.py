"""Attribution: the scores of all cells, and their way into files and tables."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from guda_fast._files import atomic_write
from guda_fast._validate import check_int
from guda_fast.diffusion.schedule import FloatArray

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


SCORES = "scores.parquet"
RECORD = "run.json"
COLUMNS = ("query_id", "query", "group", "score", "std_error", "draws", "exact", "error_base", "error_group")


class RankedGroup(NamedTuple):
    """One of a query's top groups."""

    group: str
    score: float
    std_error: float


@dataclass(frozen=True, eq=False)
class Attribution:
    """Scores of N queries under K groups: by how much each query's ELBO drops without the group.

    queries: names [N]. query_ids: [N, 0..2^64-1]. groups: names [K].
    scores: positive where the group mattered, in nats for the elbo weightings [(N, K), float64].
    std_error: [(N, K), float64; NaN where unknown]. std_error_kind: how it was estimated.
    draws: draws behind each cell. error_base: weighted errors of the base, summed over draws [(N,), float64].
    base_errors: the same by draw [(N, D), float64; None when read from a file].
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
        return [
            [RankedGroup(self.groups[k], float(self.scores[i, k]), float(self.std_error[i, k])) for k in row]
            for i, row in enumerate(order)
        ]

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
            columns = {name: table[name].to_numpy().reshape(count, len(groups)) for name in COLUMNS if name != "group"}
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
        )

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
