"""Finished training runs on disk: a diffusers model folder that says how it was made."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from guda_fast._files import atomic_write
from guda_fast.errors import CheckpointError

RECORD = "training.json"
MANIFEST = "manifest.json"
_LOSS_WINDOW = 100
_OF_A_RUN = ("group", "members", "steps")


def finished(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether ``folder`` holds a finished run with just these settings.

    An empty folder holds none.

    Raises CheckpointError, naming the differences, when it holds a run with other settings, a record that cannot be
    read, or something else.
    """
    record = folder / RECORD
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not record.exists():
        raise CheckpointError(f"{folder}: must be new, empty, or a run of this command, found no {RECORD} in it")
    try:
        found = json.loads(record.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{record}: must be the record of a finished run, found {type(error).__name__}: {error}; "
            f"remove {folder} to make it anew"
        ) from error
    wanted = json.loads(json.dumps(dict(settings)))  # tuples are lists there
    if found != wanted:
        raise CheckpointError(
            f"{record}: was made with other settings ({_differences(wanted, found)}); "
            f"choose another folder, or remove {folder} to make it anew"
        )
    return True


def check_alike(out: Path, settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming the differences, where a finished run in ``out`` is not one of the same series.

    settings: of any run of the series. Runs of one series differ in group, members and steps; a base beside them is
    none of theirs.
    """
    wanted = _common(json.loads(json.dumps(dict(settings))))
    for record in sorted(out.glob(f"*/{RECORD}")):
        try:
            found = json.loads(record.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # who needs it will say so
        if not isinstance(found, Mapping) or found.get("run") == "base" or _common(found) == wanted:
            continue
        raise CheckpointError(
            f"{record}: was made with other settings ({_differences(wanted, _common(found))}); models of one series "
            "are made alike: choose another --out"
        )


def _common(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _OF_A_RUN}


@contextmanager
def unfinished(folder: Path, within: Path | None = None) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when the block ends without an error, and is removed otherwise.

    folder: must not exist, or be empty; its parents are made.
    within: where the temporary folder is, on the same file system [beside ``folder``]; made where it is not there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    within = within or folder.parent
    within.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=within))
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


def write_manifest(folder: Path, record: Mapping[str, Any]) -> None:
    """Write what the data are (``guda_fast.datasets.manifest``) beside what is made of them."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / MANIFEST, "w") as file:
        file.write(json.dumps(dict(record), indent=2) + "\n")


def save_run(
    folder: Path,
    write: Callable[[Path], object],
    settings: Mapping[str, Any],
    losses: Sequence[float],
    seconds: float,
    *,
    within: Path | None = None,
    **found: Any,
) -> None:
    """Write a model and the record of its run; the folder appears whole or not at all.

    folder: must not exist, or be empty.
    write: writes the model into a folder that is there, such as its ``save_pretrained``.
    settings: JSON values that define the run. losses: one a step. seconds: wall time of the training.
    within: see ``unfinished``. found: what else is worth knowing about the run, as JSON values.
    """
    tail = list(losses)[-_LOSS_WINDOW:]
    with unfinished(folder, within) as temporary:
        write(temporary)
        write_record(temporary, settings, loss=sum(tail) / len(tail), seconds=round(seconds, 3), **found)


def _differences(wanted: Mapping[str, Any], found: Any) -> str:
    if not isinstance(found, Mapping):
        return f"settings must be an object, found {found!r}"
    wanted, found = _flat(wanted), _flat(found)
    keys = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    return ", ".join(f"{key}: wanted {wanted.get(key)!r}, found {found.get(key)!r}" for key in keys)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings within settings, such as an operator's options, under names like ``options.weight``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": one for inner, one in _flat(value).items()}
        else:
            found[key] = value
    return found
