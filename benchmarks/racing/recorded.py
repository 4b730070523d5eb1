"""Per-draw differences of real models in a file, which estimators are replayed on without a forward."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guda_fast import DeltaBank, Protocol
from guda_fast._files import atomic_write
from guda_fast.cli.named import sources_in
from guda_fast.diffusion.schedule import FloatArray
from guda_fast.forward import Rows
from guda_fast.prepare import Execution, prepare

ARRAYS = ("differences", "timesteps", "groups")


@dataclass(frozen=True, eq=False)
class Recorded:
    """Weighted differences w_t (e_k - e_0) of every draw.

    differences: not divided by the samples per timestep [(N, K, T, S), float64]. timesteps: ascending [(T,), int].
    groups: their names [K].
    """

    differences: FloatArray
    timesteps: FloatArray
    groups: Sequence[str]

    @property
    def draws(self) -> FloatArray:
        """What the protocol sums, timestep by timestep [(N, K, T S), float64]."""
        queries, groups, _, samples = self.differences.shape
        scaled: FloatArray = self.differences.reshape(queries, groups, -1) / samples
        return scaled

    def save(self, path: Path) -> None:
        """Write the arrays, whole or not at all."""
        with atomic_write(path, "wb") as file:
            np.savez(file, differences=self.differences, timesteps=self.timesteps, groups=np.array(self.groups))

    @staticmethod
    def load(path: Path) -> Recorded:
        """Read what `save` wrote. Raises ValueError naming the file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                differences, timesteps, groups = (file[name] for name in ARRAYS)
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: must be what `python -m benchmarks.racing record` writes: {error}") from error
        if differences.ndim == 3:  # one sample per timestep
            differences = differences[..., None]
        shape = (*differences.shape[:1], len(groups), len(timesteps), *differences.shape[3:])
        if differences.shape != shape or (np.diff(timesteps) <= 0).any():
            raise ValueError(
                f"{path}: must be differences {shape} of rising timesteps, found {differences.shape} of {timesteps}"
            )
        return Recorded(differences.astype(np.float64), timesteps, [str(group) for group in groups])


def record(base: Path, models: Path, queries: Path, protocol: Protocol, most: int | None = None) -> Recorded:
    """Run every draw of every query under every model of a folder.

    base, models: as `guda-fast score` takes --base and --groups. queries: a folder of PNG files. most: that many of
    them, from the first on [all].
    """
    bank = DeltaBank.load(base, sources_in(models, {}, "MODELS"))
    prepared = prepare(sorted(queries.glob("*.png"))[:most], bank, protocol, Execution())
    engine, found = prepared.engine, prepared.queries
    noised = engine.queries(found.x0, found.ids, found.distinct_names, conditions=found.conditions)
    rows = Rows.product(len(found.x0), list(range(1, len(bank) + 1)), protocol.draws)
    shape = (len(bank), len(found.x0), len(protocol.timesteps), protocol.samples)
    differences = engine.differences(noised, rows).reshape(shape).transpose(1, 0, 2, 3) * protocol.samples
    return Recorded(np.ascontiguousarray(differences), np.array(protocol.timesteps), list(bank.groups))
