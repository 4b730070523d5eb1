"""Scoring with freed memory kept or given back: python -m benchmarks.kept_memory OUT.

A row for each network, setting and pass: seconds of a job after a first one, page faults meanwhile, and the process's
largest size. Each is a process of its own, for the C library does not forget a setting; settings alternate.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

import guda_fast as gf
from benchmarks.provenance import provenance, write_rows
from benchmarks.workloads import ARCHITECTURES

PASSES = 5
JOBS = {"digits": (256, 40), "rgb32": (32, 20)}  # queries and timesteps
BATCH = 64


def child(network: str, kept: bool) -> dict[str, str]:
    if kept and not gf.keep_freed_memory():
        raise SystemExit("this C library cannot keep freed memory")
    queries, steps = JOBS[network]
    architecture = ARCHITECTURES[network]
    torch.manual_seed(0)
    base = architecture.make().eval()
    other = {name: value + 0.01 * torch.randn_like(value) for name, value in base.state_dict().items()}
    bank = gf.DeltaBank.load(base, {"group": other}, scheduler=architecture.scheduler())
    protocol = gf.Protocol.from_scheduler(bank.scheduler, start=10, stride=1000 // steps)
    x0 = torch.rand(queries, *architecture.shape) * 2 - 1
    for _ in range(2):
        faults, begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        gf.attribute(x0, bank, protocol, batch_size=BATCH, device="cpu", plan="swap")
    seconds, used = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": f"{seconds:.3f}",
        "page_faults": str(used.ru_minflt - faults),
        "peak_mib": f"{used.ru_maxrss / 1024:.0f}",
        "threads": str(torch.get_num_threads()),
    }


def main() -> None:
    if sys.argv[1] == "child":
        print(json.dumps(child(sys.argv[2], sys.argv[3] == "kept")))
        return
    out = Path(sys.argv[1])
    shared = provenance("cpu") | {"command": f"python -m benchmarks.kept_memory {out}"}
    rows = []
    for network in JOBS:
        for number in range(PASSES):
            for setting in ("kept", "given back")[:: 1 if number % 2 else -1]:
                command = [sys.executable, "-m", "benchmarks.kept_memory", "child", network, setting]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows.append({"network": network, "memory": setting, "pass": number} | json.loads(printed) | shared)
                print(*list(rows[-1].values())[:6], flush=True)
    write_rows(out, rows)


if __name__ == "__main__":
    main()
