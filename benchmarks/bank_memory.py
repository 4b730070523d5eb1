"""Peak memory of a bank whose counterfactuals are files, and of swapping through all of them, by number of groups.

    python -m benchmarks.bank_memory benchmarks/results/bank_memory.csv

Each row is a process of its own, with one thread: the 35.7 M network in float32, in channels-last, is loaded from
safetensors folders, surveyed, and made each counterfactual in turn (the same files stand for all groups). Megabytes are
VmHWM less what a small bank took before in the same process, in which all code was loaded; models is the same in units
of the network. No forward is in it.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.provenance import provenance
from benchmarks.workloads import ARCHITECTURES
from guda_fast import DeltaBank

NETWORK = "ddpm-cifar10"
GROUPS = (2, 20)
COLUMNS = ("network", "groups", "load_ms", "megabytes", "models", "commit", "date", "command")
COMMAND = "python -m benchmarks.bank_memory"


def peak_megabytes() -> float:
    """The largest resident size of this process so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:"))


def save(folder: Path, network: str) -> None:
    """A base and one counterfactual that differs in every parameter."""
    torch.manual_seed(0)
    model = ARCHITECTURES[network].make()
    model.save_pretrained(folder / network / "base")  # type: ignore[operator]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder / network / "other")  # type: ignore[operator]


def use(folder: Path, network: str, groups: int) -> float:
    """Load, survey and apply every group; returns the seconds of loading."""
    begin = time.perf_counter()
    other = folder / network / "other"
    bank = DeltaBank.load(folder / network / "base", {f"group {k}": other for k in range(groups)})
    seconds = time.perf_counter() - begin
    bank.to(memory_format=torch.channels_last)
    bank.survey()
    for group in bank.groups:
        bank.apply(group)
    bank.restore()
    return seconds


def child(folder: Path, groups: int) -> None:
    """Print the milliseconds of loading and the megabytes."""
    use(folder, "tiny", 2)
    before = peak_megabytes()
    seconds = use(folder, NETWORK, groups)
    print(seconds * 1e3, peak_megabytes() - before)


def main() -> None:
    if len(sys.argv) == 4:
        child(Path(sys.argv[2]), int(sys.argv[3]))
        return
    out = Path(sys.argv[1])
    megabytes = 4 * ARCHITECTURES[NETWORK].parameters() / 1e6
    shared = provenance("cpu")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for network in ("tiny", NETWORK):
            save(Path(folder), network)
        for groups in GROUPS:
            command = [sys.executable, "-m", "benchmarks.bank_memory", "child", folder, str(groups)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
            printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            load, peak = map(float, printed.split()[-2:])
            figures = (NETWORK, groups, f"{load:.1f}", f"{peak:.1f}", f"{peak / megabytes:.3f}")
            rows.append((*figures, shared["commit"], shared["date"], f"{COMMAND} {out}"))
            print(*figures)
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
