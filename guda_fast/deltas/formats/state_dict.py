"""State dicts: safetensors files, torch checkpoints, mappings in memory."""

from __future__ import annotations

import json
import os
import re
import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from safetensors import SafetensorError, safe_open

from guda_fast.deltas.reading import read_tensor
from guda_fast.deltas.weights import CONTAINERS, Entry, Weights, entry_of
from guda_fast.errors import CheckpointError

SHADOWS = "shadow_params."
"""How the tensors of an ``EMAModel`` are called here; the file has a list of them."""
_TEXT_ENCODERS = ("text_encoder", "text_model.", "lora_te", "cond_stage_model.", "conditioner.", "modifier_token")
_LONGEST_KEY = 1000
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"
_LFS_POINTER = b"version https://git-lfs"
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What torch says of a pickle that is intact and asks for more than weights_only=True allows.
_REFUSED = re.compile(r"(?<=GLOBAL )\S+|unrecognized function \S+|Can only (?:create|build) [^,]+|\S+ must be imported")


def open_file(path: Path, *, average: bool = False) -> Weights:
    """Open a state dict file; whether it is safetensors or a torch checkpoint is read from its content.

    average: as for ``from_mapping``

    Values are read when asked for, one tensor at a time, and leave nothing of the file in memory. Torch checkpoints of
    the format before version 1.6 are the exception: they can only be read whole.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except (OSError, ValueError) as error:  # a ValueError for a name with a null character
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not start:
        raise CheckpointError(f"{path}: the file is empty")
    if start == _LFS_POINTER:
        raise CheckpointError(f"{path}: this is a Git LFS pointer, not the model; fetch it with `git lfs pull`")
    if start[8:9] == b"{":
        return _open_safetensors(path)
    if start.startswith((_ZIP_MAGIC, _PICKLE_MAGIC)):
        return _open_pickle(path, zipped=start.startswith(_ZIP_MAGIC), average=average)
    raise CheckpointError(f"{path}: neither a safetensors file nor a torch checkpoint, or cut off at its start")


def looks_like_weights(path: Path) -> bool:
    """Whether a file begins as those do that ``open_file`` can open."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:9] == b"{" or start.startswith((_ZIP_MAGIC, _PICKLE_MAGIC))


def from_mapping(loaded: object, origin: str, *, average: bool = False) -> Weights:
    """The state dict in ``loaded``: under one of the usual keys, or the mapping itself.

    The list of an ``EMAModel`` becomes ``shadow_params.0`` and so on.

    average: of a mapping that has both, take the moving average and not the weights
    """
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{origin}: must hold a state dict, found {type(loaded).__name__}{_inside(loaded)}")
    shadows = loaded.get(SHADOWS[:-1])
    state: Mapping[Any, Any] = next((loaded[key] for key in CONTAINERS if isinstance(loaded.get(key), Mapping)), loaded)
    if isinstance(shadows, list | tuple):
        if average or not any(isinstance(value, torch.Tensor) for value in state.values()):
            state = {f"{SHADOWS}{position}": value for position, value in enumerate(shadows)}
        elif state is loaded:
            state = {key: value for key, value in loaded.items() if value is not shadows}
    if state is not loaded:
        _refuse_text_encoders([key for key, value in loaded.items() if isinstance(value, Mapping) and value], origin)
    _check_keys(state, origin)
    if not any(isinstance(value, torch.Tensor) for value in state.values()):
        found = ", ".join(repr(key) for key in list(state)[:5]) or "nothing"
        raise CheckpointError(
            f"{origin}: must hold tensors by name, at the top or under one of {', '.join(CONTAINERS)}; found {found}"
        )
    return Weights(origin, {key: entry_of(value, origin) for key, value in state.items()})


def _check_keys(keys: Iterable[object], origin: str) -> None:
    """Refuse keys that are no names: what readers do with a name may take time that grows with its square."""
    for key in keys:
        if not isinstance(key, str):
            raise CheckpointError(f"{origin}: keys must be strings, found {key!r}")
        if len(key) > _LONGEST_KEY:
            raise CheckpointError(
                f"{origin}: key '{key[:40]}...' must have at most {_LONGEST_KEY} characters, found {len(key)}"
            )


def refuse_text_encoders(weights: Weights, known: Collection[str]) -> None:
    """Raise CheckpointError where a key is a text encoder's, unless it is one of the base's (``known``)."""
    _refuse_text_encoders([name for name in weights.entries if name not in known], weights.origin)


def _refuse_text_encoders(keys: Iterable[object], origin: str) -> None:
    for key in keys:
        if isinstance(key, str) and key.startswith(_TEXT_ENCODERS):
            raise CheckpointError(
                f"{origin}: key {key!r} belongs to a text encoder, which the base does not hold; its changes would "
                "have to reach the prompt embeddings of this group, so pass the denoiser's tensors alone only if it "
                "stays as it was"
            )


def _inside(loaded: object) -> str:
    """Where in a list the state dict is, for a message."""
    if not isinstance(loaded, list | tuple):
        return ""
    at = [str(position) for position, value in enumerate(loaded) if isinstance(value, Mapping)]
    return f" with mappings at {', '.join(at)}: pass the mapping, or a callable that gives it" if at else ""


class _OpenFile:
    """A file whose values are read into memory of their own, where a mapping would stay resident once touched."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, size: int) -> bytes:
        """The first ``size`` bytes."""
        return os.pread(self._descriptor, size, 0)

    def tensor(self, key: str, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensor whose bytes begin at ``start``."""
        return read_tensor(self._descriptor, self._path, key, start, shape, dtype)


def _open_safetensors(path: Path) -> Weights:
    try:
        # Checks the header, and the length of the file against it.
        with safe_open(path, framework="pt", device="cpu"):
            file = _OpenFile(path)
    except (RuntimeError, OSError) as error:
        # RuntimeError: it opens the file by itself a second time, where no more can be open.
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or truncated safetensors file: {error}") from error
    values = 8 + int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(values)[8:])
    _check_keys(header, str(path))
    entries = {}
    for key, about in header.items():
        if key != "__metadata__":
            shape, dtype = tuple(about["shape"]), _SAFETENSORS_DTYPES.get(about["dtype"], torch.uint8)
            read = partial(file.tensor, key, values + about["data_offsets"][0], shape, dtype)
            foreign = about["dtype"] not in _SAFETENSORS_DTYPES
            problem = f"must be floating or integer values of 8 bits or more, found {about['dtype']}" if foreign else ""
            entries[key] = Entry(str(path), read, problem, shape, dtype)
    return Weights(str(path), entries, files=(path,), metadata=header.get("__metadata__") or {})


def _open_pickle(path: Path, *, zipped: bool, average: bool) -> Weights:
    if zipped:
        _check_archive(path)
    # Given a path that ends so, torch expects safetensors; a file object it takes as it is, but cannot map.
    mapped = zipped and path.suffix != ".safetensors"
    loaded = _load_pickle(path, mapped=mapped)
    return replace(from_mapping(loaded, str(path), average=average), files=(path,))


def _check_archive(path: Path) -> None:
    """Refuse what torch.save never writes and torch.load would unpack: a few bytes may hold many gigabytes."""
    try:
        with ZipFile(path) as archive:
            members = archive.infolist()
    # A damaged directory can raise anything that its fields lead to, and every case means the same to the user.
    except Exception as error:
        raise CheckpointError(
            f"{path}: damaged or truncated torch checkpoint ({type(error).__name__}: {error})"
        ) from error
    for member in members:
        if member.compress_type != ZIP_STORED:
            raise CheckpointError(
                f"{path}: {member.filename!r} must be stored as torch.save does, found it compressed to "
                f"{member.compress_size} of {member.file_size} bytes"
            )


def _load_pickle(path: Path, *, mapped: bool) -> object:
    try:
        if mapped:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
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
