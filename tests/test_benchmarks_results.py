"""The benchmarks' command line, and what is made of rows: their check, plots and the summary of a GPU run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import results, runner
from benchmarks.__main__ import app
from benchmarks.plots import draw
from benchmarks.registry import Benchmark, benchmarks
from benchmarks.summary import page

ROOT = Path(__file__).resolve().parent.parent
MEASURED = sorted(name for name in benchmarks() if (runner.RESULTS / f"{name}.csv").exists())


def row(**change: str) -> dict[str, object]:
    """A row as the runner writes it."""
    values = dict.fromkeys(runner.COLUMNS, "x") | {
        "op": "denoising_error",
        "backend": "triton",
        "shapes": "M=4 R=2048 S=4x16x16",
        "dtype": "float32",
        "threads": "1",
        "median_ms": "2.0",
        "p20_ms": "1.5",
        "p80_ms": "2.5",
        "bytes": "8000000",
        "gb_per_s": "4.0",
        "tflop_per_s": "",
        "rival_median_ms": "6.0",
        "ratio": "3.0",
        "command": "python -m benchmarks run x",
    }
    return {**values, **change}


def rival(**change: str) -> dict[str, object]:
    """The row of what `row` is compared with."""
    own = {"backend": "eager", "median_ms": "6.0", "p20_ms": "5.0", "p80_ms": "7.0"}
    return row(**(own | {"ratio": "1.0", "gb_per_s": "1.333"} | change))


@pytest.mark.parametrize("name", sorted(benchmarks()))
def test_committed_results(name: str) -> None:
    """What measures the CPU has rows; what measures a GPU may wait for one; all rows are complete and consistent."""
    if name in MEASURED:
        assert results.problems(runner.RESULTS / f"{name}.csv") == []
    else:
        assert benchmarks()[name].device == "cuda"


def test_committed_noise_ops_meet_their_targets() -> None:
    """4 Mi elements on one thread: 3.5 times eager with AVX-512, 2.5 times with AVX2 (the project's bar)."""
    rows = [row for row in runner.read_csv(runner.RESULTS / "noise_ops_cpu.csv") if row["shapes"] == "R=1024 S=4x32x32"]
    bar = {"avx512": 3.5, "avx2": 2.5}
    measured = {(row["op"], row["instruction_set"]): row for row in rows if row["dtype"] == "float32"}
    for op in ("add_noise", "denoising_error"):
        for instruction_set, least in bar.items():
            row = measured[op, instruction_set]
            assert row["threads"] == "1"
            assert float(row["ratio"]) >= least


def test_committed_noise_ops_scale_to_two_threads() -> None:
    """At least 1.8 times one thread, in each op with float32 (the project's bar)."""
    rows = runner.read_csv(runner.RESULTS / "noise_ops_threads.csv")
    two = [row for row in rows if row["threads"] == "2" and row["dtype"] == "float32"]
    scaling = {(row["op"], row["instruction_set"]): float(row["ratio"]) for row in two}
    for op in ("add_noise", "denoising_error"):
        for instruction_set in ("avx2", "avx512"):
            assert scaling[op, instruction_set] >= 1.8


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"commit": ""}, "row 2: commit is empty"),
        ({"command": "python -m benchmarks run x --quick"}, "row 2: --quick does not measure"),
        ({"ratio": "fast"}, "row 2: a figure is no number"),
        ({"p80_ms": "1.9"}, "row 2: percentiles must rise from above 0, got 1.5, 2.0, 1.9"),
        ({"ratio": "3.2"}, "row 2: ratio must be rival_median_ms / median_ms = 3.000, got 3.2"),
        ({"ratio": "nan"}, "row 2: a figure is not finite"),
        ({"bytes": ""}, "row 2: a figure is no number"),
        ({"rival_median_ms": "6.01"}, "row 2: rival_median_ms must be the median_ms of a row of this case, got 6.01"),
        ({"gb_per_s": "5"}, "row 2: gb_per_s must be bytes / median_ms = 4.000, got 5.0"),
    ],
)
def test_problems_of_a_row(tmp_path: Path, change: dict[str, str], problem: str) -> None:
    path = tmp_path / "x.csv"
    runner.write_csv(path, [row(), rival()])
    assert results.problems(path) == []
    runner.write_csv(path, [row(**change), rival()])
    (found,) = results.problems(path)
    assert found.startswith(problem)


def test_problems_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    assert results.problems(path) == ["there is no such file"]
    runner.write_csv(path, [])
    assert results.problems(path) == ["it has no rows"]
    path.write_text("op,backend\na,b\n")
    assert "missing: ['bytes'," in results.problems(path)[0]
    path.write_bytes(b"\xff")
    assert "it must be UTF-8" in results.problems(path)[0]
    runner.write_csv(path, [rival(), rival()])
    (double,) = results.problems(path)
    assert double.startswith("2 rows are of one contender: denoising_error M=4")
    text = path.read_text()
    path.write_text(text[: text.rindex("x,")])
    assert results.problems(path) == ["row 3: it is cut short"]


def test_plot_draws_no_row_that_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.__main__.benchmarks", lambda: {"x": Benchmark("x", lambda quick: [])})
    runner.write_csv(tmp_path / "x.csv", [row(ratio="9")])
    result = CliRunner().invoke(app, ["plot", "x", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "x.csv: not drawn: row 2: " in result.output
    assert not (tmp_path / "x.svg").exists()


def test_plot_is_reproducible(tmp_path: Path) -> None:
    rows = [{name: str(value) for name, value in row().items()}, {**row(threads="2", ratio="6")}]  # type: ignore[dict-item]
    first, second = (draw("x", rows, tmp_path / folder) for folder in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    text = first.read_text()
    assert "denoising_error float32" in text
    assert "triton (x, 2 threads)" in text
    assert first.stat().st_size < 2**17


@pytest.mark.parametrize("name", MEASURED)
def test_committed_plots_show_the_committed_rows(name: str, tmp_path: Path) -> None:
    """Redrawn by `python -m benchmarks plot`; compared by their numbers, as fonts move the rest."""
    drawn = draw(name, runner.read_csv(runner.RESULTS / f"{name}.csv"), tmp_path)
    numbers = [line.strip() for line in drawn.read_text().splitlines() if "<text" in line and "> " in line]
    committed = (runner.RESULTS / "plots" / f"{name}.svg").read_text()
    assert numbers
    assert all(line.partition(">")[2] in committed for line in numbers)


def test_summary(tmp_path: Path) -> None:
    ceilings = [
        row(op="copy", backend="eager", gb_per_s="5"),
        row(op="matmul", backend="eager", tflop_per_s="700"),
        row(op="normals", backend="triton", shapes="1048576 elements", median_ms="1"),
    ]
    runner.write_csv(tmp_path / "gpu_ceilings.csv", ceilings)
    rows = [
        row(),
        row(backend="eager", ratio="1"),
        row(shapes="M=1 R=2048 S=4x16x16", median_ms="2.1"),
        row(shapes="M=11 R=1 S=1", gb_per_s="4.5"),
    ]
    runner.write_csv(tmp_path / "gpu_noise_ops.partial", rows)
    (tmp_path / "steps.tsv").write_text("noise\tstopped after 120 s\t120\n")
    text = page(tmp_path)
    assert "| noise | stopped after 120 s | 120 |" in text
    assert "copy (M=4 R=2048 S=4x16x16 float32): 2.0 ms, 5 GB/s" in text
    assert "2.0 ms, 700 TFLOP/s" in text
    assert "normals (1048576 elements float32): 1 ms, 1.049 G/s" in text
    assert "| denoising_error | M=4 R=2048 S=4x16x16 | float32 | 2, 80 %, 3.00x | 2, 80 %, 1.00x |" in text
    assert "- MISSED: denoising_error M=4 R=2048 S=4x16x16 float32 triton: 80 % of the copy bandwidth" in text
    assert "- met: denoising_error M=11 R=1 S=1 float32 triton: 90 % of the copy bandwidth (wanted 85 %)" in text
    # 2 Mi elements in 2.1 ms, against 1 Mi in 1 ms.
    assert "S=4x16x16 float32 triton: 95 % of the kernel that only makes normals (wanted 90 %)" in text
    assert "eager: " not in text.partition("## Targets")[2]


def test_summary_projects_the_published_job(tmp_path: Path) -> None:
    """(10 + 1) x 2,048 x 399 forwards, at 3 x 64 x 24 of them in 500 ms."""
    shapes = "guda-cifar10 dense, N=64 K=2 D=24 batch=512"
    scored = row(
        op="score", backend="guda_fast swap", shapes=shapes, median_ms="500", dtype="bfloat16", tflop_per_s="350"
    )
    other = row(op="score", shapes=shapes.replace("dense", "rank 16"), tflop_per_s="1")
    runner.write_csv(tmp_path / "gpu_ladder.partial", [scored, other])
    text = page(tmp_path)
    assert "## The published job: 8.99 M forwards" in text
    assert "- guda_fast swap, bfloat16: 16.3 min, 350 TFLOP/s\n" in text
    runner.write_csv(tmp_path / "gpu_ceilings.csv", [row(op="matmul", tflop_per_s="700")])
    assert "350 TFLOP/s, 50 % of the float32 matrix product" in page(tmp_path)
    assert page(tmp_path).count("min, ") == 1


def test_summary_of_nothing(tmp_path: Path) -> None:
    assert "Nothing was measured." in page(tmp_path)


def test_command_line_refuses(tmp_path: Path) -> None:
    unknown = CliRunner().invoke(app, ["run", "nothing", "--out", str(tmp_path)])
    assert unknown.exit_code == 2
    assert "must be all or one of" in unknown.output
    assert CliRunner().invoke(app, ["run", "noise_ops_cpu", "--quick"]).exit_code == 2
    assert CliRunner().invoke(app, ["run", "noise_ops_cpu", "--device", "tpu"]).exit_code == 2
    (tmp_path / "file").touch()
    assert CliRunner().invoke(app, ["run", "noise_ops_cpu", "--out", str(tmp_path / "file")]).exit_code == 2
    assert CliRunner().invoke(app, ["summary", str(tmp_path / "absent")]).exit_code == 2


def test_tune_has_its_own_arguments() -> None:
    pytest.importorskip("triton")
    result = CliRunner().invoke(app, ["tune", "nothing"])
    assert result.exit_code == 2
    assert "must be one of add_noise" in result.output
    assert "--sizes" in CliRunner().invoke(app, ["tune", "--help"]).output


def test_run_says_what_it_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is named and cannot run is a failure; among all it is left out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        "benchmarks.__main__.benchmarks", lambda: {"g": Benchmark("g", lambda quick: [], device="cuda")}
    )
    for name, code in (("g", 1), ("all", 0)):
        result = CliRunner().invoke(app, ["run", name, "--out", str(tmp_path)])
        assert result.exit_code == code
        assert "g: not run: torch finds no GPU" in result.output


@pytest.mark.parametrize(("green", "rows", "code"), [(True, True, 0), (False, True, 1), (True, False, 1)])
def test_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, green: bool, rows: bool, code: int) -> None:
    """Red tests or a row that does not hold: either is a failure."""
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    monkeypatch.setattr(runner, "tests_pass", lambda benchmark: green)
    monkeypatch.setattr(
        "benchmarks.__main__.benchmarks",
        lambda: {"x": Benchmark("x", lambda quick: []), "g": Benchmark("g", lambda quick: [], device="cuda")},
    )
    if rows:
        runner.write_csv(tmp_path / "x.csv", [row(), rival()])
    result = CliRunner().invoke(app, ["verify", "all"])
    assert result.exit_code == code
    assert "g: no rows yet" in result.output
    assert ("x.csv: there is no such file" in result.output) is not rows


def test_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("run", "verify", "plot", "summary"))
