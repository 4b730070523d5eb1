"""Scoring with freed memory kept or given back, and the reference loop: python -m benchmarks.kept_memory OUT.

A row for each network, setting and pass: seconds of a job after a first one, page faults meanwhile, and the process's
largest size. Each is a process of its own, for the C library does not forget a setting; settings alternate. Ours with
its memory kept is what the commands run, and the reference loop is as research code runs it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import guda_fast as gf
from benchmarks.ladder import reference_loop
from benchmarks.provenance import provenance, write_rows
from benchmarks.workloads import Workload, make_workload

PASSES = 3
JOBS = {"digits": (256, 40), "rgb32": (64, 25)}  # queries and timesteps
SETTINGS = ("kept", "given back", "reference loop")
BATCH = 64


def child(network: str, setting: str) -> dict[str, str]:
    """One job, run twice; the figures of the second time."""
    if setting == "kept" and not gf.keep_freed_memory():
        raise SystemExit("this C library cannot keep freed memory")
    queries, steps = JOBS[network]
    workload = make_workload(network, "dense", models=1, queries=queries, draws=steps)
    run = partial(reference_loop(workload, "cpu").scores, workload.queries) if "loop" in setting else _ours(workload)
    for _ in range(2):
        faults, begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        run()
    seconds, used = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": f"{seconds:.3f}",
        "page_faults": str(used.ru_minflt - faults),
        "peak_mib": f"{used.ru_maxrss / 1024:.0f}",
        "threads": str(torch.get_num_threads()),
    }


def _ours(workload: Workload) -> Callable[[], object]:
    bank = gf.DeltaBank.load(workload.base, {delta.origin: delta for delta in workload.deltas})
    options = {"batch_size": BATCH, "device": "cpu", "plan": "swap"}
    return partial(gf.attribute, workload.queries, bank, workload.protocol, **options)


def main() -> None:
    if sys.argv[1] == "child":
        print(json.dumps(child(sys.argv[2], sys.argv[3])))
        return
    out = Path(sys.argv[1])
    shared = provenance("cpu") | {"command": f"python -m benchmarks.kept_memory {out}"}
    rows = []
    for network in JOBS:
        for number in range(PASSES):
            for setting in SETTINGS[:: 1 if number % 2 else -1]:
                command = [sys.executable, "-m", "benchmarks.kept_memory", "child", network, setting]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows.append({"network": network, "setting": setting, "pass": number} | json.loads(printed) | shared)
                print(*list(rows[-1].values())[:6], flush=True)
    write_rows(out, rows)


if __name__ == "__main__":
    main()
