"""What unlearning did to the ordinary loss: on the group that was to be forgotten, and on the images that remain.

    python -m benchmarks.unlearning_losses FILE.csv --base BASE --data SPEC NAME=FOLDER ...

FOLDER has a model a group, as guda-fast unlearn makes them. A row a method and group: the loss of the base and of the
unlearned model on the same draws (timesteps, noise, images of the training data), and the quotient less 1. Rows of
methods that are not named stay in the file.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.provenance import provenance
from guda_fast import DeltaBank, Schedule
from guda_fast.cli.named import sources_in
from guda_fast.counterfactuals import DenoisingObjective
from guda_fast.datasets import GroupedImages, open_dataset

COLUMNS = (
    *("method", "group", "draws", "forget_base", "forget", "forget_change", "retain_base", "retain", "retain_change"),
    *("commit", "date", "command"),
)
COMMAND = "python -m benchmarks.unlearning_losses"
BATCHES, ROWS = 16, 256


@torch.no_grad()
def loss(model: nn.Module, data: GroupedImages, schedule: Schedule, index: Tensor) -> float:
    """The mean squared error over fixed draws of some of the images."""
    objective = DenoisingObjective(data, schedule, index, batch_size=ROWS)
    generator, total = torch.Generator().manual_seed(0), 0.0
    for _ in range(BATCHES):
        rows = objective.rows(generator)
        given = {} if rows.condition is None or data.conditions is None else data.conditions.take(rows.condition)
        prediction = model(rows.x_t, rows.t, return_dict=False, **given)[0][:, : rows.x_t.shape[1]]
        assert isinstance(rows.target, Tensor)
        total += (prediction - rows.target).double().square().mean().item()
    return total / BATCHES


def rows_of(method: str, folder: Path, base: Path, data: GroupedImages) -> Iterator[dict[str, Any]]:
    """A row a group."""
    bank = DeltaBank.load(base, sources_in(folder, {}, "NAME=FOLDER"))
    schedule = Schedule.from_scheduler(bank.scheduler or {})
    for group in bank.groups:
        row: dict[str, Any] = {"method": method, "group": group, "draws": BATCHES * ROWS}
        for side, index in (("forget", data.group(group)), ("retain", data.rest(group))):
            before = loss(bank.restore(), data, schedule, index)
            after = loss(bank.apply(group), data, schedule, index)
            row |= {
                f"{side}_base": f"{before:.6g}",
                side: f"{after:.6g}",
                f"{side}_change": f"{after / before - 1:.4f}",
            }
        yield row


def kept(path: Path, methods: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Rows of other methods that the file has."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["method"] not in methods]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("methods", nargs="+", metavar="NAME=FOLDER")
    given = parser.parse_args()
    methods = {name: Path(folder) for name, _, folder in (entry.partition("=") for entry in given.methods)}
    data = open_dataset(given.data)
    made = provenance()
    about = {"commit": made["commit"], "date": made["date"], "command": f"{COMMAND} --data {given.data}"}
    found = kept(given.out, methods)
    for method, folder in methods.items():
        found += [{**row, **about} for row in rows_of(method, folder, given.base, replace(data, controls=()))]
    with given.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
