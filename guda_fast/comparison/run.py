"""Running a method once: its answer as a result on disk, which the same method on the same setting finds again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from guda_fast._version import __version__
from guda_fast.comparison.costs import Cost
from guda_fast.comparison.methods import Found, Method, Setting
from guda_fast.datasets.manifest import manifest
from guda_fast.results import RECORD, Attribution

_ASKED = "asked"


class Scored(NamedTuple):
    """A method's result. reused: whether it was there already."""

    result: Attribution
    cost: Cost
    reused: bool


def run_method(method: Method, setting: Setting, folder: Path) -> Scored:
    """The method's result for a setting, from ``folder`` where it is there, or else computed and written into it.

    A result of other settings in the folder is replaced. Raises what the method raises, with the folder as it was.
    """
    asked = _asked(method, setting)
    if (folder / RECORD).exists():
        result = Attribution.from_parquet(folder)
        if result.provenance.get(_ASKED) == asked:
            return Scored(result, _cost(result.provenance), reused=True)
    begin = time.perf_counter()
    found = method.run(setting)
    cost = Cost(time.perf_counter() - begin, found.forwards, found.making, setting.device, torch.get_num_threads())
    result = _result(found, setting).with_provenance(
        **{_ASKED: asked},
        forwards={"used": cost.forwards},
        seconds={"making": cost.making, "scoring": cost.seconds},
        device=cost.device,
        threads=cost.threads,
        versions={"guda_fast": __version__, "torch": torch.__version__},
    )
    result.to_parquet(folder)
    return Scored(result, cost, reused=False)


def _cost(record: Mapping[str, Any]) -> Cost:
    """What a result says that it took."""
    seconds = record["seconds"]
    return Cost(seconds["scoring"], record["forwards"]["used"], seconds["making"], record["device"], record["threads"])


def _asked(method: Method, setting: Setting) -> dict[str, Any]:
    """All that an answer depends on, as JSON values."""
    ids = json.dumps([*setting.queries.query_ids])
    found = {
        "method": dict(method.settings),
        "base": setting.bank.base_hash,
        "protocol": setting.protocol.to_dict(),
        "data": manifest(setting.data)["hash"],
        "queries": hashlib.blake2b(ids.encode(), digest_size=16).hexdigest(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _result(found: Found, setting: Setting) -> Attribution:
    queries = setting.queries
    scores = np.asarray(found.scores, dtype=np.float64)[queries.row]
    return Attribution(
        queries=queries.names,
        query_ids=queries.query_ids,
        groups=tuple(setting.data.groups),
        scores=scores,
        std_error=np.full(scores.shape, np.nan),
        degrees=np.full(scores.shape, np.nan, dtype=np.float32),
        std_error_kind="none",
        draws=np.zeros(scores.shape, dtype=np.int32),
        exact=np.zeros(scores.shape, dtype=bool),
        error_base=np.full(len(queries), np.nan),
    )
