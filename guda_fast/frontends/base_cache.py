"""The base's errors in an ``.npz`` file, as the script's cache writer has them: read after checks, and written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guda_fast._files import atomic_write
from guda_fast.diffusion.schedule import FloatArray
from guda_fast.errors import CheckpointError
from guda_fast.forward import POLICIES
from guda_fast.frontends.npz import NpzFile

# The cache has float32 divergences of float32 posterior means, which are within 1e-4 of ours; those of other noise or
# of another batch size differ by a few percent in almost every cell.
_SAME = 1e-3
# A path is shorter on every system; the longest part of a config, its betas, has 25 characters each.
_LONGEST_PATH, _LONGEST_CONFIG = 2**12, 2**20
VERSION = 1


@dataclass(frozen=True, eq=False)
class BaseCache:
    """What a cache must be of, and how it is read and written.

    path: of the file. names: of the image files, in the order of the run [N]. paths: their full paths [N].
    timesteps: rising, as in a protocol [D]. config: everything else that the errors depend on, as JSON values.
    """

    path: Path
    names: Sequence[str]
    paths: Sequence[str]
    timesteps: Sequence[int]
    config: Mapping[str, Any]

    def read(self) -> tuple[FloatArray, bool]:
        """The base's errors [(N, D), float64], and whether the file says that they are of this very run.

        A file of the script's own writer says too little: check some of its cells with `check_cells`. Its ``config``
        is a pickle, which is never read. Of a file no more is held in memory than what a cache of this run has.
        Raises CheckpointError naming file, key, what was expected and found.
        """
        with NpzFile(self.path) as file:
            return self._errors(file), self._is_own(file)

    def check_cells(self, cached: FloatArray, found: FloatArray) -> None:
        """Compare cells of a cache that does not say what it is of with the same cells as computed here.

        cached, found: one cell an image [(N,), float64]
        Raises CheckpointError naming the file and the first image whose cell differs.
        """
        off = np.abs(cached - found) > _SAME * np.abs(found)
        if off.any():
            image = int(np.argmax(off))
            raise CheckpointError(
                f"{self.path}: key 'kl_base' must be of this base, seed and batch size, found {cached[image]:.6g} for "
                f"{self.names[image]} where {found[image]:.6g} was computed (the script's cache writer takes batches "
                "of 128 and its scorer of 64 by default, which gives them different noise)"
            )

    def write(self, errors: FloatArray) -> None:
        """Write errors of this run [(N, D), float64], rounded to float32 as the format has them."""
        with atomic_write(self.path, "wb") as file:
            np.savez_compressed(
                file,
                kl_base=errors[:, ::-1].astype(np.float32),
                image_paths=np.array(self.paths),
                timesteps=np.array(self.timesteps[::-1]),
                seed=np.array(self.config["seed"]),
                config=np.array(json.dumps(self._full_config(), sort_keys=True)),
            )

    def _full_config(self) -> dict[str, Any]:
        return {**self.config, "writer": "guda_fast", "version": VERSION}

    def _errors(self, file: NpzFile) -> FloatArray:
        images, draws = len(self.names), len(self.timesteps)
        wanted = list(self.timesteps)[::-1]
        timesteps = file.array("timesteps", "iu", [draws]).tolist()
        if timesteps != wanted:
            raise CheckpointError(f"{self.path}: key 'timesteps' must be {_short(wanted)}, found {_short(timesteps)}")
        seed = int(file.array("seed", "iu", []))
        if seed != self.config["seed"]:
            raise CheckpointError(f"{self.path}: key 'seed' must be {self.config['seed']}, found {seed}")
        names = [Path(str(path)).name for path in file.array("image_paths", "U", [images], longest=_LONGEST_PATH)]
        if names != list(self.names):
            raise CheckpointError(
                f"{self.path}: key 'image_paths' must name {_short(self.names)}, found {_short(names)}; noise depends "
                "on which images share a batch, so that they must be the same in the same order"
            )
        values = file.array("kl_base", "f", [images, draws])
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.path}: key 'kl_base' must be finite, found NaN or infinity")
        return values[:, ::-1].astype(np.float64)

    def _is_own(self, file: NpzFile) -> bool:
        config = self._config(file)
        if config is None:
            if POLICIES[self.config["precision"]].storage is not None:
                raise CheckpointError(
                    f"{self.path}: must be a cache of {self.config['precision']}, found one that says nothing of its "
                    "precision, as the script writes them in fp32; use --precision fp32, or name another file"
                )
            return False
        wanted = self._full_config()
        for key in sorted(wanted.keys() | config.keys()):
            if wanted.get(key) != config.get(key):
                raise CheckpointError(
                    f"{self.path}: {key} in key 'config' must be {_short(wanted.get(key))}, found "
                    f"{_short(config.get(key))}; delete the file, or name another one"
                )
        return True

    def _config(self, file: NpzFile) -> dict[str, Any] | None:
        """What the file says of itself; None where that is nothing, or a pickle."""
        if "config" not in file.keys or file.kind("config") != "U":
            return None
        try:
            config = json.loads(str(file.array("config", "U", [], longest=_LONGEST_CONFIG)))
        except (json.JSONDecodeError, RecursionError):
            return None
        return config if isinstance(config, dict) else {}


def _short(values: object) -> str:
    if isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 3:
        return f"{len(values)} from {values[0]} to {values[-1]}"
    return str(values)
