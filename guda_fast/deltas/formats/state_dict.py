"""State dicts: safetensors files, torch checkpoints, mappings in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from guda_fast.deltas.weights import CONTAINERS, Entry, Weights
from guda_fast.errors import CheckpointError

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"
_LFS_POINTER = b"version https://git-lfs"
# What torch says of a pickle that is intact and asks for more than weights_only=True allows.
_REFUSED = re.compile(r"(?<=GLOBAL )\S+|unrecognized function \S+|Can only (?:create|build) [^,]+|\S+ must be imported")


def open_file(path: Path) -> Weights:
    """Open a state dict file; whether it is safetensors or a torch checkpoint is read from its content."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not start:
        raise CheckpointError(f"{path}: the file is empty")
    if start == _LFS_POINTER:
        raise CheckpointError(f"{path}: this is a Git LFS pointer, not the model; fetch it with `git lfs pull`")
    if start[8:9] == b"{":
        return _open_safetensors(path)
    if start.startswith((_ZIP_MAGIC, _PICKLE_MAGIC)):
        # Only the zip format can be mapped; older files are read whole.
        return from_mapping(_load_pickle(path, mmap=start.startswith(_ZIP_MAGIC)), str(path))
    raise CheckpointError(f"{path}: neither a safetensors file nor a torch checkpoint, or cut off at its start")


def from_mapping(loaded: object, origin: str) -> Weights:
    """The state dict in ``loaded``: under one of the usual keys, or the mapping itself."""
    if isinstance(loaded, Mapping):
        state = next((loaded[key] for key in CONTAINERS if isinstance(loaded.get(key), Mapping)), loaded)
    else:
        raise CheckpointError(f"{origin}: must hold a state dict, found {type(loaded).__name__}")
    for key in state:
        if not isinstance(key, str):
            raise CheckpointError(f"{origin}: keys must be strings, found {key!r}")
    if not any(isinstance(value, torch.Tensor) for value in state.values()):
        found = ", ".join(repr(key) for key in list(state)[:5]) or "nothing"
        raise CheckpointError(
            f"{origin}: must hold tensors by name, at the top or under one of {', '.join(CONTAINERS)}; found {found}"
        )
    return Weights(origin, {key: Entry(origin, partial(state.__getitem__, key)) for key in state})


def _open_safetensors(path: Path) -> Weights:
    try:
        handle: Any = safe_open(path, framework="pt", device="cpu")
        keys = list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated safetensors file: {error}") from error
    return Weights(str(path), {key: Entry(str(path), partial(_read_tensor, handle, path, key)) for key in keys})


def _read_tensor(handle: Any, path: Path, key: str) -> torch.Tensor:
    try:
        tensor: torch.Tensor = handle.get_tensor(key)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: key {key!r} cannot be read: {error}") from error
    return tensor


def _load_pickle(path: Path, *, mmap: bool) -> object:
    try:
        # Given a path that ends so, torch expects safetensors; a file object it takes as it is, but cannot map.
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    # A damaged pickle program can raise anything at all, and every case means the same to the user.
    except Exception as error:
        if refused := _REFUSED.search(str(error)):
            raise CheckpointError(
                f"{path}: holds more than tensors and plain containers ({refused[0]}), and reading that could run "
                "code. If you trust the file, convert it once: model = torch.load(path, weights_only=False), then "
                "safetensors.torch.save_file(<its state dict>, 'model.safetensors')"
            ) from error
        detail = "" if "Weights only" in str(error) else f": {str(error).partition('. ')[0]}"
        raise CheckpointError(
            f"{path}: damaged or truncated torch checkpoint ({type(error).__name__}{detail})"
        ) from error
