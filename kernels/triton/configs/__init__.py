"""Launch configurations: how a kernel is cut into programs, from one plain table per class of device.

A table is a JSON file beside this one, named after the class: ``sm_90.json`` for CUDA's compute capability 9.0, and
``default.json`` for everything that has no table of its own, Triton's interpreter included. It maps an op and the bits
of its elements to entries: sizes, each a power of two, and the configuration that was fastest there. The entry with
the nearest sizes runs: distances are counted in doublings and added up over the sizes, the first of equals wins.

A configuration changes speed, never a bit of a result: what the order of a sum depends on is no part of one.
`python -m benchmarks.tune` measures candidates on the GPU at hand and extends its table.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
DEFAULT = "default"

_JSON_NAMES = {dict: "an object", list: "a list", int: "an integer"}

ConfigT = TypeVar("ConfigT", bound=tuple[int, ...])  # a NamedTuple of integers
KindT = TypeVar("KindT")


class Entry(NamedTuple):
    """One line of a table: the sizes (powers of two) and the fields of an op's configuration."""

    sizes: dict[str, int]
    config: dict[str, int]


Table: TypeAlias = dict[str, list[Entry]]


def configuration(op: str, kind: type[ConfigT], like: Tensor, **sizes: int) -> ConfigT:
    """The configuration of an op for a call of these sizes; costs a dictionary's look-up after the first.

    kind: the op's NamedTuple of integers; an entry has exactly its fields
    like: a tensor of the call, for the device and the number of bits that an element has
    sizes: what the op's entries are keyed on, such as ``rows``
    """
    doublings = tuple((name, max(size - 1, 0).bit_length()) for name, size in sizes.items())
    config: ConfigT = _nearest(key(op, like), kind, device_class(like.device), doublings)
    return config


def key(op: str, like: Tensor) -> str:
    """An op's name in a table: tiles of one width of elements may not fit another's."""
    return f"{op}/{8 * like.element_size()}"


@functools.cache
def device_class(device: torch.device) -> str:
    """The name of a device's table."""
    if device.type != "cuda":
        return DEFAULT
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def _nearest(op: str, kind: type[ConfigT], device: str, doublings: tuple[tuple[str, int], ...]) -> ConfigT:
    for path in (FOLDER / f"{device}.json", FOLDER / f"{DEFAULT}.json"):
        entries = load(path).get(op, [])
        for number, entry in enumerate(entries):
            where = f"{path}: {op}[{number}]"
            _same_keys(entry.sizes, dict(doublings), f"{where}.sizes")
            _same_keys(entry.config, kind._fields, f"{where}.config")  # type: ignore[attr-defined]
        if entries:
            nearest = min(entries, key=lambda entry: _distance(entry.sizes, doublings))
            return kind(**nearest.config)
    raise ValueError(f"{path}: {op} must have an entry, got none")


def _distance(sizes: Mapping[str, int], doublings: tuple[tuple[str, int], ...]) -> int:
    return sum(abs((sizes[name] - 1).bit_length() - wanted) for name, wanted in doublings)


def load(path: Path) -> Table:
    """Read a table; an absent file is an empty one. ValueError names the file and the key that is wrong."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON, got {error}") from error
    return {
        op: [_entry(entry, f"{path}: {op}[{number}]") for number, entry in enumerate(_of(list, lines, f"{path}: {op}"))]
        for op, lines in _of(dict, content, f"{path}: the table").items()
    }


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"no key twice, got {[key for key, _ in pairs]}")
    return found


def _entry(content: object, where: str) -> Entry:
    parts = _of(dict, content, where)
    _same_keys(parts, Entry._fields, where)
    for part, values in parts.items():
        for name, value in _of(dict, values, f"{where}.{part}").items():
            number = _of(int, value, f"{where}.{part}.{name}")
            # Tiles and warps too: of all fields, how many steps are loaded ahead is alone free.
            if number < 1 or (name != "stages" and number & (number - 1)):
                wanted = "positive" if name == "stages" else "a power of two"
                raise ValueError(f"{where}.{part}.{name} must be {wanted}, got {number}")
    return Entry(**parts)


def _of(kind: type[KindT], value: object, where: str) -> KindT:
    if type(value) is not kind:  # bool is an int, but no number of anything
        raise ValueError(f"{where} must be {_JSON_NAMES[kind]}, got {value!r}")
    return value


def _same_keys(found: Collection[str], wanted: Collection[str], where: str) -> None:
    if set(found) != set(wanted):
        raise ValueError(f"{where} must have the keys {sorted(wanted)}, got {sorted(found)}")


def dump(table: Table) -> str:
    """The text of a table: one entry a line, in the order of their sizes."""
    ops = []
    for op, entries in sorted(table.items()):
        ordered = sorted(entries, key=lambda entry: list(entry.sizes.values()))
        ops.append(f"  {json.dumps(op)}: [\n    " + ",\n    ".join(json.dumps(e._asdict()) for e in ordered) + "\n  ]")
    return "{\n" + ",\n".join(ops) + "\n}\n"
