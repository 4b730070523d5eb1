"""``python -m benchmarks run|verify|plot|tune``: measure, check what is committed, draw it, tune kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import results, runner
from benchmarks.registry import Benchmark, benchmarks

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

Name = Annotated[str, typer.Argument(help="Which benchmark, or all; an unknown name lists them.")]
Folder = Annotated[Path, typer.Option(help="Where NAME.csv goes.")]
PLOTS = runner.RESULTS / "plots"


@app.command()
def run(
    name: Name,
    out: Annotated[Path | None, typer.Option(help="The folder of NAME.csv; default benchmarks/results.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads, for us and for the rivals; default: the benchmark's own.")
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option(min=3, help="Timed calls of each contender; default: the benchmark's own.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Small shapes: it runs, it does not measure.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: what it is meant for.")] = None,
    tested: Annotated[bool, typer.Option(help="The tests have just passed: do not run them again.")] = False,
) -> None:
    """Run the tests of an op, then measure it against its rivals in the same process."""
    if quick and out is None:
        raise typer.BadParameter("--quick needs --out: it would replace measurements")
    if device not in (None, "cpu", "cuda"):
        raise typer.BadParameter(f"--device must be cpu or cuda, got {device}")
    if out is not None and out.exists() and not out.is_dir():
        raise typer.BadParameter(f"--out must be a folder, got the file {out}")
    settings = runner.Settings(threads, repetitions, quick, device)
    failed = False
    for benchmark in _chosen(name):
        reason = runner.missing_device(benchmark, settings)
        if reason is not None:
            typer.echo(f"{benchmark.name}: not run: {reason}", err=True)
            failed |= name != "all"
            continue
        runner.use_interpreter(benchmark, settings)
        target = (out or runner.RESULTS) / f"{benchmark.name}.csv"
        if tested:
            runner.measure_cases(benchmark, target, settings)
        elif not runner.run(benchmark, target, settings):
            failed = True
            continue
        typer.echo(f"wrote {target}")
    if failed:
        raise typer.Exit(1)


@app.command()
def test(name: Name) -> None:
    """Run the tests of an op and nothing else."""
    green = [runner.tests_pass(benchmark) for benchmark in _chosen(name)]
    if not all(green):
        raise typer.Exit(1)


@app.command()
def verify(name: Name) -> None:
    """Run the tests of an op, and check the committed rows: their columns, provenance and arithmetic."""
    failed = False
    for benchmark in _chosen(name):
        path = runner.RESULTS / f"{benchmark.name}.csv"
        if not path.exists() and benchmark.device == "cuda":
            typer.echo(f"{benchmark.name}: no rows yet")
            continue
        problems = results.problems(path)
        for problem in problems:
            typer.echo(f"{path.name}: {problem}", err=True)
        green = runner.tests_pass(benchmark)
        typer.echo(f"{benchmark.name}: tests {'pass' if green else 'fail'}, problems of the rows: {len(problems)}")
        failed |= not green or bool(problems)
    if failed:
        raise typer.Exit(1)


@app.command()
def plot(name: Name, out: Annotated[Path, typer.Option(help="The folder of NAME.svg.")] = PLOTS) -> None:
    """Draw the committed rows: how fast against the rival, and the bandwidth reached."""
    from benchmarks.plots import draw

    failed = False
    for benchmark in _chosen(name):
        path = runner.RESULTS / f"{benchmark.name}.csv"
        if not path.exists():
            typer.echo(f"{benchmark.name}: no rows yet")
            continue
        problems = results.problems(path)
        if problems:
            typer.echo(f"{path.name}: not drawn: {problems[0]}", err=True)
            failed = True
            continue
        target = draw(benchmark.name, runner.read_csv(path), out)
        typer.echo(f"wrote {target}")
    if failed:
        raise typer.Exit(1)


@app.command()
def summary(folder: Annotated[Path, typer.Argument(help="What benchmarks/gpu.sh wrote.")]) -> None:
    """One page about a run on a GPU: ceilings, ops, and which targets were met."""
    from benchmarks.summary import page

    if not folder.is_dir():
        raise typer.BadParameter(f"must be a folder, got {folder}")
    typer.echo(page(folder))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def tune(context: typer.Context) -> None:
    """Measure launch configurations on the GPU at hand; `tune --help` has its arguments."""
    # Imported here: it defines kernels, which settles whether Triton's interpreter runs them.
    from benchmarks.tune import tune as tune_op

    command = typer.Typer(add_completion=False)
    command.command()(tune_op)
    command(context.args, prog_name="python -m benchmarks tune")


def _chosen(name: str) -> list[Benchmark]:
    known = benchmarks()
    if name == "all":
        return list(known.values())
    if name not in known:
        raise typer.BadParameter(f"must be all or one of {', '.join(known)}, got {name}")
    return [known[name]]


if __name__ == "__main__":
    app()
