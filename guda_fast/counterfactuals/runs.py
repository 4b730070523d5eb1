"""Finished training runs on disk: a diffusers model folder that says how it was made."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from guda_fast.errors import CheckpointError

RECORD = "training.json"
_LOSS_WINDOW = 100


def finished(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether ``folder`` holds a finished run with just these settings.

    Raises CheckpointError, naming the differences, when it holds a run with other settings, or a record that
    cannot be read.
    """
    record = folder / RECORD
    if not folder.exists():
        return False
    try:
        found = json.loads(record.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{record}: must be the record of a finished run, found {type(error).__name__}: {error}; "
            f"remove {folder} to make it anew"
        ) from error
    if found != dict(settings):
        raise CheckpointError(
            f"{record}: was made with other settings ({_differences(settings, found)}); "
            f"choose another folder, or remove {folder} to make it anew"
        )
    return True


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when the block ends without an error, and is removed otherwise.

    folder: must not exist; its parents are made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):  # safetensors has no class of its own for a full disk
            raise OSError(f"{folder}: cannot be written ({error})") from error
        raise


def write_record(folder: Path, settings: Mapping[str, Any], **found: Any) -> None:
    """Write what ``finished`` compares, with what else is worth knowing about the run, as JSON."""
    text = json.dumps({"settings": dict(settings), **found}, indent=2)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def save_run(folder: Path, model: Any, settings: Mapping[str, Any], losses: Sequence[float], seconds: float) -> None:
    """Write a model with ``save_pretrained`` and the record of its run; the folder appears whole or not at all.

    folder: must not exist. model: anything with ``save_pretrained`` (a model or a pipeline).
    settings: JSON values that define the run. losses: one a step. seconds: wall time of the training.
    """
    tail = list(losses)[-_LOSS_WINDOW:]
    with unfinished(folder) as temporary:
        model.save_pretrained(temporary)
        write_record(temporary, settings, loss=sum(tail) / len(tail), seconds=round(seconds, 3))


def _differences(wanted: Mapping[str, Any], found: Any) -> str:
    if not isinstance(found, Mapping):
        return f"settings must be an object, found {found!r}"
    keys = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    return ", ".join(f"{key}: wanted {wanted.get(key)!r}, found {found.get(key)!r}" for key in keys)
