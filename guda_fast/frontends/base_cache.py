"""The base's errors in an ``.npz`` file, as the script's cache writer has them: read after checks, and written."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guda_fast._files import atomic_write
from guda_fast.diffusion.schedule import FloatArray
from guda_fast.errors import CheckpointError

# The cache has float32 divergences of float32 posterior means, which are within 1e-4 of ours; those of other noise or
# of another batch size differ by a few percent in almost every cell.
_SAME = 1e-3
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
        is a pickle, which is never read.
        Raises CheckpointError naming file, key, what was expected and found.
        """
        try:
            # numpy leaves a file open that it was given by name and cannot read.
            with self.path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                return self._errors(file), self._is_own(file)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
            if isinstance(error, CheckpointError | FileNotFoundError | PermissionError):
                raise
            raise CheckpointError(f"{self.path}: must be a whole .npz file, found a damaged one ({error})") from error

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

    def _errors(self, file: Any) -> FloatArray:
        names = [Path(str(path)).name for path in self._array(file, "image_paths", "U", 1)]
        timesteps = self._array(file, "timesteps", "iu", 1).tolist()
        wanted = list(self.timesteps)[::-1]
        if timesteps != wanted:
            raise CheckpointError(f"{self.path}: key 'timesteps' must be {_short(wanted)}, found {_short(timesteps)}")
        seed = int(self._array(file, "seed", "iu", 0))
        if seed != self.config["seed"]:
            raise CheckpointError(f"{self.path}: key 'seed' must be {self.config['seed']}, found {seed}")
        if names != list(self.names):
            raise CheckpointError(
                f"{self.path}: key 'image_paths' must name {_short(self.names)}, found {_short(names)}; noise depends "
                "on which images share a batch, so that they must be the same in the same order"
            )
        values = self._array(file, "kl_base", "f", 2)
        if values.shape != (len(names), len(wanted)):
            raise CheckpointError(
                f"{self.path}: key 'kl_base' must have shape {(len(names), len(wanted))}, found {values.shape}"
            )
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.path}: key 'kl_base' must be finite, found NaN or infinity")
        return values[:, ::-1].astype(np.float64)

    def _is_own(self, file: Any) -> bool:
        try:
            config = json.loads(str(file["config"]))
        except ValueError:  # a pickle, which numpy refuses; or no JSON
            return False
        wanted = self._full_config()
        found = config if isinstance(config, dict) else {}
        for key in sorted(wanted.keys() | found.keys()):
            if wanted.get(key) != found.get(key):
                raise CheckpointError(
                    f"{self.path}: {key} in key 'config' must be {_short(wanted.get(key))}, found "
                    f"{_short(found.get(key))}; delete the file, or name another one"
                )
        return True

    def _array(self, file: Any, key: str, kinds: str, dimensions: int) -> np.ndarray[Any, Any]:
        if key not in file.files:
            raise CheckpointError(f"{self.path}: key {key!r} must be there, found {', '.join(file.files) or 'none'}")
        try:
            array: np.ndarray[Any, Any] = file[key]
        except ValueError as error:
            raise CheckpointError(f"{self.path}: key {key!r} must be plain values, found {error}") from error
        if array.dtype.kind not in kinds or array.ndim != dimensions:
            raise CheckpointError(
                f"{self.path}: key {key!r} must have {dimensions} dimensions of kind {' or '.join(kinds)}, "
                f"found {array.dtype} of shape {array.shape}"
            )
        return array


def _short(values: object) -> str:
    if isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 3:
        return f"{len(values)} from {values[0]} to {values[-1]}"
    return str(values)
