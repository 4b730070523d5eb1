"""``python -m benchmarks NAME``: run one benchmark and write its CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.provenance import ROOT
from benchmarks.registry import benchmarks
from benchmarks.runner import run


def main(
    name: Annotated[str, typer.Argument(help="Which benchmark; an unknown name lists them.")],
    out: Annotated[Path | None, typer.Option(help="The CSV; default benchmarks/results/NAME.csv.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads, for us and for the rivals.")] = 1,
    repetitions: Annotated[int, typer.Option(min=3, help="Timed calls of each contender.")] = 31,
    quick: Annotated[bool, typer.Option(help="Small shapes: it runs, it does not measure.")] = False,
) -> None:
    """Run the tests of an op, then measure it against its rivals in the same process."""
    known = benchmarks()
    if name not in known:
        raise typer.BadParameter(f"must be one of {', '.join(known)}, got {name}")
    if quick and out is None:
        raise typer.BadParameter("--quick needs --out: it would replace measurements")
    target = out or ROOT / "benchmarks" / "results" / f"{name}.csv"
    if not run(known[name], target, threads=threads, repetitions=repetitions, quick=quick):
        raise typer.Exit(1)
    typer.echo(f"wrote {target}")


if __name__ == "__main__":
    typer.run(main)
