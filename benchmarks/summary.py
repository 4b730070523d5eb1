"""One page of Markdown about a run of benchmarks/gpu.sh: its steps, the ceilings, the ops, and the targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.projection import PUBLISHED_FORWARDS, projections
from benchmarks.runner import read_csv

Row = Mapping[str, str]

# Shares of a ceiling that the project wants: of the copy bandwidth, and of the kernel that only makes normals.
OF_COPY, OF_NORMALS = 0.85, 0.90
MODELS_FOR_BANDWIDTH = 4
OURS = ("triton", "cuda")


def page(folder: Path) -> str:
    """From the CSV files of the folder, finished or partial, and steps.tsv."""
    results = {path.stem: read_csv(path) for path in sorted([*folder.glob("*.partial"), *folder.glob("*.csv")])}
    results = {name: rows for name, rows in results.items() if rows}
    dry = any("--quick" in row["command"] for rows in results.values() for row in rows)
    lines = ["# Dry run: its figures measure nothing" if dry else "# GPU run", ""]
    steps = folder / "steps.tsv"
    if steps.is_file():
        lines += ["| step | outcome | seconds |", "| --- | --- | ---: |"]
        lines += [f"| {' | '.join(line.split(chr(9)))} |" for line in steps.read_text().splitlines()]
    if not results:
        return "\n".join([*lines, "", "Nothing was measured."])
    first = next(iter(results.values()))[0]
    lines += ["", ", ".join(f"{key} {first[key] or 'unknown'}" for key in ("device", "torch", "triton", "cuda"))]
    lines += [f"commit {first['commit'] or 'unknown'}, {first['date']}", ""]
    ceilings = {row["op"]: row for row in results.get("gpu_ceilings", [])}
    lines += [f"Ceiling {_ceiling(row)}" for row in ceilings.values()]
    for name, rows in results.items():
        if name != "gpu_ceilings":
            lines += ["", f"## {name}: ms, of the copy bandwidth, times the rival", "", *_table(rows, ceilings)]
    projected = [line for rows in results.values() for line in projections(rows, ceilings.get("matmul"))]
    if projected:
        lines += [
            "",
            f"## The published job: {PUBLISHED_FORWARDS / 1e6:.2f} M forwards at these speeds",
            "",
            *projected,
        ]
    verdicts = [verdict for rows in results.values() for row in rows for verdict in _targets(row, ceilings)]
    return "\n".join([*lines, "", "## Targets", "", *(verdicts or ["None was measured."])])


def _ceiling(row: Row) -> str:
    rate = f"{row['tflop_per_s']} TFLOP/s" if row["tflop_per_s"] else f"{row['gb_per_s']} GB/s"
    if row["op"] == "normals":
        rate = f"{int(row['shapes'].split()[0]) / float(row['median_ms']) / 1e6:.4g} G/s"
    return f"{row['op']} ({row['shapes']} {row['dtype']}): {row['median_ms']} ms, {rate}  "


def _table(rows: Sequence[Row], ceilings: Mapping[str, Row]) -> Iterator[str]:
    """A line for each case; of each contender milliseconds, share of the copy bandwidth, times the rival's speed."""
    contenders = list(dict.fromkeys(row["backend"] for row in rows))
    cases: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        share = _of_copy(row, ceilings)
        percent = "" if share is None else f", {100 * share:.0f} %"
        cells = cases.setdefault((row["op"], row["shapes"], row["dtype"]), {})
        cells[row["backend"]] = f"{float(row['median_ms']):.4g}{percent}, {float(row['ratio']):.2f}x"
    yield f"| op | shapes | dtype | {' | '.join(contenders)} |"
    yield f"| --- | --- | --- |{' ---: |' * len(contenders)}"
    for case, cells in cases.items():
        yield f"| {' | '.join(case)} | {' | '.join(cells.get(name, '') for name in contenders)} |"


def _of_copy(row: Row, ceilings: Mapping[str, Row]) -> float | None:
    if "copy" not in ceilings:
        return None
    return float(row["gb_per_s"]) / float(ceilings["copy"]["gb_per_s"])


def _targets(row: Row, ceilings: Mapping[str, Row]) -> Iterator[str]:
    """What performance asks of one row of ours, met or missed."""
    if row["backend"] not in OURS or row["op"] not in ("group_norm_silu", "add_noise", "denoising_error"):
        return
    # Small shapes say nothing about the targets.
    if "--quick" in row["command"]:
        return
    many_models = row["shapes"].startswith("M=") and int(row["shapes"].split()[0][2:]) >= MODELS_FOR_BANDWIDTH
    if row["op"] == "group_norm_silu" or many_models:
        share, wanted, of = _of_copy(row, ceilings), OF_COPY, "the copy bandwidth"
    elif "normals" in ceilings:
        share, wanted, of = _of_normals(row, ceilings["normals"]), OF_NORMALS, "the kernel that only makes normals"
    else:
        share = None
    if share is not None:
        met = "met" if share >= wanted else "MISSED"
        where = f"{row['op']} {row['shapes']} {row['dtype']} {row['backend']}"
        yield f"- {met}: {where}: {100 * share:.0f} % of {of} (wanted {100 * wanted:.0f} %)"


def _of_normals(row: Row, normals: Row) -> float:
    """Normals a second: the op's rows times their elements, against the ceiling's."""
    fields = dict(part.split("=") for part in row["shapes"].split() if "=" in part)
    elements = int(fields["R"])
    for size in fields["S"].split("x"):
        elements *= int(size)
    rate = elements / float(row["median_ms"])
    return rate / (int(normals["shapes"].split()[0]) / float(normals["median_ms"]))
