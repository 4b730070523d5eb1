"""Time and memory of similarity for many images and queries.

    python -m benchmarks.similarity_memory benchmarks/results/similarity_memory.csv

Random features of 768 dimensions: 10,000 queries and 50,000 images in 10 and in 1,000 groups, each reduction of
`guda_fast.baselines.similarity`, one thread. The rival has all cosines in one float64 matrix of numpy, 4 GB, and
reduces it; its groups lie side by side, so that it need not gather columns. `centroid` needs no cosines, and has no
rival. Each row of ours is a process of its own; the rival makes its matrix once, and that time is in all of its rows.
`cpu_s` are seconds of the processor, of which `ratio` is the rival's by ours: seconds by the clock are those of a
machine that had other work. `megabytes` are the peak of resident memory above what the process held with its inputs.
Scores of both are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.memory import peak_extra_bytes
from benchmarks.provenance import provenance, write_rows
from guda_fast.baselines import similarity

FEATURES, NEAREST = 768, 10
OURS, RIVAL = "similarity", "dense numpy"
REDUCTIONS = ("mean", "max", "top-k", "centroid")
Array = NDArray[np.float64]


def inputs(queries: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(queries, FEATURES, generator=generator), torch.randn(images, FEATURES, generator=generator)


def members(images: int, groups: int) -> dict[str, torch.Tensor]:
    return {str(number): index for number, index in enumerate(torch.arange(images).chunk(groups))}


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds by the clock and of the processor, and megabytes."""
    begin = time.perf_counter(), time.process_time()
    extra = peak_extra_bytes(work)
    if extra is None:
        raise OSError("the peak of memory is read from /proc, which is not there")
    return {
        "seconds": time.perf_counter() - begin[0],
        "cpu_s": time.process_time() - begin[1],
        "megabytes": extra / 1e6,
    }


def ours(folder: Path, queries: int, images: int, groups: int, reduce: str) -> dict[str, Any]:
    asked, known = inputs(queries, images)
    of_groups = members(images, groups)
    similarity(asked[:16], known[:16], members(16, 2), reduce=reduce)  # loads code
    found: list[Array] = []
    figures = measured(lambda: found.append(similarity(asked, known, of_groups, reduce=reduce, k=NEAREST)))
    np.save(folder / f"{OURS} {groups} {reduce}.npy", found[0])
    return {"contender": OURS, "groups": groups, "reduce": reduce, **figures}


def cosines(asked: torch.Tensor, known: torch.Tensor) -> Array:
    first, second = (values.double().numpy() for values in (asked, known))
    for values in (first, second):
        values /= np.linalg.norm(values, axis=1, keepdims=True)
    dense: Array = first @ second.T
    return dense


def reduced(dense: Array, parts: list[slice], reduce: str) -> Array:
    """The rival's scores from all cosines."""
    if reduce == "mean":
        return np.stack([dense[:, part].mean(axis=1) for part in parts], axis=1)
    if reduce == "max":
        return np.stack([dense[:, part].max(axis=1) for part in parts], axis=1)
    columns = []
    for part in parts:
        highest = min(NEAREST, part.stop - part.start)
        columns.append(np.partition(dense[:, part], -highest, axis=1)[:, -highest:].mean(axis=1))
    return np.stack(columns, axis=1)


def rivals(folder: Path, queries: int, images: int, sizes: list[int]) -> Iterator[dict[str, Any]]:
    asked, known = inputs(queries, images)
    cosines(asked[:16], known[:16])  # loads code
    made: list[Array] = []
    matrix = measured(lambda: made.append(cosines(asked, known)))
    for groups in sizes:
        parts = [slice(int(index[0]), int(index[-1]) + 1) for index in members(images, groups).values()]
        for reduce in REDUCTIONS[:3]:
            found: list[Array] = []
            own = measured(lambda parts=parts, reduce=reduce, to=found: to.append(reduced(made[0], parts, reduce)))
            np.save(folder / f"{RIVAL} {groups} {reduce}.npy", found[0])
            yield {
                "contender": RIVAL,
                "groups": groups,
                "reduce": reduce,
                **{key: matrix[key] + own[key] for key in ("seconds", "cpu_s")},
                "megabytes": max(matrix["megabytes"], made[0].nbytes / 1e6 + own["megabytes"]),
            }


def in_a_process(*arguments: object) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.similarity_memory", "child", *map(str, arguments)]
    alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | alone)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def child(folder: str, queries: str, images: str, *case: str) -> None:
    given = Path(folder), int(queries), int(images)
    if len(case) == 2 and case[1] in REDUCTIONS:
        print(json.dumps([ours(*given, int(case[0]), case[1])]))
    else:
        print(json.dumps(list(rivals(*given, [int(size) for size in case]))))


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--groups", type=int, nargs="+", default=[10, 1000])
    given = parser.parse_args()
    shared = provenance("cpu") | {"command": f"python -m benchmarks.similarity_memory {' '.join(sys.argv[1:])}"}
    with tempfile.TemporaryDirectory() as name:
        size = name, given.queries, given.images
        found = in_a_process(*size, *given.groups)
        beside = {(row["groups"], row["reduce"]): row["cpu_s"] for row in found}
        for groups in given.groups:
            for reduce in REDUCTIONS:
                (row,) = in_a_process(*size, groups, reduce)
                if (groups, reduce) in beside:
                    row["ratio"] = f"{beside[groups, reduce] / row['cpu_s']:.3f}"
                    both = (np.load(Path(name) / f"{who} {groups} {reduce}.npy") for who in (OURS, RIVAL))
                    np.testing.assert_allclose(*both, rtol=0, atol=1e-12)
                found.append(row)
    rows = [
        {
            "queries": given.queries,
            "images": given.images,
            "features": FEATURES,
            "threads": 1,
            "groups": row["groups"],
            "reduce": row["reduce"],
            "contender": row["contender"],
            **{key: f"{row[key]:.2f}" for key in ("seconds", "cpu_s")},
            "megabytes": f"{row['megabytes']:.0f}",
            "ratio": row.get("ratio", ""),
            **shared,
        }
        for row in found
    ]
    write_rows(given.out, rows)


if __name__ == "__main__":
    main()
