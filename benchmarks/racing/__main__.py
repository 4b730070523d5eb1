"""``python -m benchmarks.racing record|monte-carlo``: what racing saves, and whether its claims hold."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.racing import monte_carlo, recorded, rows
from benchmarks.racing.recorded import Recorded
from guda_fast import Protocol

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

Out = Annotated[Path, typer.Argument(help="The CSV file to write.")]
Files = Annotated[list[Path] | None, typer.Argument(help="Recorded differences; a file's name is the case's.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]


@app.command()
def record(
    base: Annotated[Path, typer.Argument(help="The base: a folder as diffusers saves it.")],
    models: Annotated[Path, typer.Argument(help="A folder with a model a group.")],
    queries: Annotated[Path, typer.Argument(help="A folder of PNG files.")],
    out: Annotated[Path, typer.Argument(help="FILE.npz to write.")],
    samples: Annotated[int, typer.Option(min=1, help="Noise samples a timestep.")] = 1,
    most: Annotated[int | None, typer.Option(min=1, help="Queries at most, the first ones.")] = None,
    start: Annotated[int, typer.Option(help="First timestep.")] = 10,
    stride: Annotated[int, typer.Option(help="Between timesteps.")] = 10,
) -> None:
    """Run the full protocol, and keep every draw's difference."""
    protocol = Protocol.from_scheduler(base / "scheduler", start=start, stride=stride, samples=samples)
    found = recorded.record(base, models, queries, protocol, most)
    found.save(out)
    typer.echo(f"{out}: {found.differences.shape} differences of queries, groups, timesteps, samples")


@app.command("monte-carlo")
def monte_carlo_(out: Out, files: Files = None, seed: Seed = 0) -> None:
    """Coverage of the protocol's own standard errors: simulated, and of recordings with many samples."""
    found: list[Mapping[str, object]] = list(monte_carlo.simulated(seed))
    for file in files or []:
        read = Recorded.load(file)
        for samples in monte_carlo.SAMPLES:
            runs = monte_carlo.real_runs(read, samples)
            found += monte_carlo.rows_of(file.stem, runs, len(read.timesteps))
    rows.write(out, monte_carlo.COLUMNS, found, command())
    typer.echo(f"wrote {out}")


def command() -> str:
    """What was typed, without the folders that its files were in."""
    return " ".join(
        ["python -m benchmarks.racing", *(Path(word).name if "/" in word else word for word in sys.argv[1:])]
    )


if __name__ == "__main__":
    app()
