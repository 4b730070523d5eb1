"""Opening all counterfactuals of a bank, and applying one: from one delta pack, and from a folder for each.

The base is a module in memory on both sides. Folders are named K times and kept few times: what is read of them when a
bank is opened does not depend on their values. Files are in the page cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.contenders import architecture
from benchmarks.registry import Benchmark, Case, Contender
from benchmarks.workloads import Workload, make_workload
from guda_fast import DeltaBank, Pack, build_pack

KEPT = 2


class _Files:
    """A pack and folders of K groups, as long as a case lasts."""

    def __init__(self, network: str, groups: int, dtype: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self.workload: Workload = make_workload(network, "dense", models=KEPT, queries=1, draws=1)
        saved = self.workload.save(folder)[1:]
        self.sources = {f"group {k}": saved[k % KEPT] for k in range(groups)}
        self.pack = folder / "bank.safetensors"
        build_pack(self.workload.base, self.sources, self.pack, dtype=dtype, force=True)

    def from_folders(self) -> DeltaBank:
        return DeltaBank.load(self.workload.base, self.sources)

    def from_pack(self) -> DeltaBank:
        return DeltaBank.load(self.workload.base, self.pack)

    def apply(self, bank: DeltaBank, number: int) -> object:
        """Make the bank's model a counterfactual of these files, which last as long as somebody can call this."""
        return bank.apply(number)

    @property
    def model_bytes(self) -> int:
        return 4 * sum(parameter.numel() for parameter in self.workload.base.parameters())


def open_case(network: str, groups: int) -> Case:
    """The bank, and the pack alone, whose headers have what a bank of folders finds by reading all values."""
    files = _Files(network, groups, "float32")
    contenders = [
        Contender("pack", architecture(), lambda number: files.from_pack()),
        Contender("pack alone", architecture(), lambda number: Pack.open(files.pack)),
        Contender("folders, surveyed", architecture(), lambda number: files.from_folders().survey()),
    ]
    return Case(
        op="open bank",
        shapes=f"{network}, K={groups}",
        dtype="float32",
        bytes=0,
        input_sets=1,
        rival=Contender("folders", architecture(), lambda number: files.from_folders()),
        contenders=contenders,
    )


def apply_case(network: str, dtype: str) -> Case:
    """Making the resident model another counterfactual, with all surveys done."""
    files = _Files(network, 2 * KEPT, dtype)
    folders, pack = files.from_folders(), files.from_pack()
    folders.survey()
    return Case(
        op="apply group",
        shapes=network,
        dtype=dtype,
        # Read the difference and theta_0, write the model.
        bytes=2 * files.model_bytes + files.model_bytes // (2 if dtype == "float16" else 1),
        input_sets=2 * KEPT,
        rival=Contender("folders", architecture(), partial(files.apply, folders)),
        contenders=[Contender("pack", architecture(), partial(files.apply, pack))],
    )


def _cases(quick: bool) -> list[Callable[[], Case]]:
    network = "tiny" if quick else "rgb32"
    opened = [partial(open_case, network, groups) for groups in ((10,) if quick else (10, 100))]
    return [*opened, *(partial(apply_case, network, dtype) for dtype in ("float32", "float16"))]


BENCHMARK = Benchmark("pack", _cases, ("tests/test_pack.py", "tests/test_pack_append.py"), repetitions=15)
