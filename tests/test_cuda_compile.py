"""The CUDA sources compiled for every target where nvcc is found: no warning, no spill, nothing that rounds anew."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import compile_cuda

NVCC = compile_cuda.find_nvcc()
REPORT = compile_cuda.ROOT / "benchmarks" / "results" / "cuda_registers.csv"
ELEMENTS = ("BFloat16", "Float16", "Float32")
FLAGS = ("false", "true")
KERNELS = {
    "add_noise": ["add_noise_kernel"],
    "denoising_error": [
        *(f"denoising_error_kernel<{e}, {packed}, {paired}>" for e in ELEMENTS for packed in FLAGS for paired in FLAGS),
        "denoising_error_total_kernel",
    ],
}


def report() -> list[dict[str, str]]:
    with REPORT.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_report_is_complete() -> None:
    rows = report()
    expected = {(kernel, str(t)) for kernels in KERNELS.values() for kernel in kernels for t in compile_cuda.TARGETS}
    assert {(row["kernel"], row["target"]) for row in rows} == expected
    assert len(rows) == len(expected)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("target", compile_cuda.TARGETS)
@pytest.mark.parametrize("source", compile_cuda.SOURCES, ids=lambda source: source.stem)
def test_compiles_without_a_warning_or_a_spill(source: Path, target: int, tmp_path: Path) -> None:
    assert NVCC is not None
    rows, inexact = compile_cuda.compile_source(NVCC, source, target, tmp_path)
    assert [row["kernel"] for row in rows] == sorted(KERNELS[source.stem])
    for row in rows:
        assert (row["stack_bytes"], row["spill_store_bytes"], row["spill_load_bytes"]) == ("0", "0", "0"), row
    assert inexact == []
    # Another release of nvcc may allocate otherwise; with this one the committed report is up to date.
    release = compile_cuda.nvcc_release(NVCC)
    committed = [row for row in report() if row["target"] == str(target) and row["nvcc"] == release]
    kernels = {row["kernel"]: row for row in committed}
    if kernels:
        assert [{**row, "nvcc": release} for row in rows] == [kernels[row["kernel"]] for row in rows]
