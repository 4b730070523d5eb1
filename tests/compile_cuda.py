"""Compiles csrc/cuda for one CUDA target after another, with no GPU, and reports what every kernel uses.

python tests/compile_cuda.py benchmarks/results/cuda_registers.csv

writes the committed report; test_cuda_compile.py compares. Flags are those of cmake/cuda.cmake with warnings as errors.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for path in (ROOT / "csrc" / "cuda").glob("*.cu") if path.stem != "device")
TARGETS = (80, 90, 100)
COLUMNS = ["kernel", "target", "registers", "shared_bytes", "stack_bytes", "spill_store_bytes", "spill_load_bytes"]
# PTX that rounds otherwise than the C++ kernels: fused float32, approximate or flushing instructions.
INEXACT = re.compile(r"\b(?:fma\.rn\.f32|\w+\.approx\S*|\w+(?:\.\w+)*\.ftz\S*)")


def find_nvcc() -> str | None:
    """Where the build looks: on PATH, else in the usual folder."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_release(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    assert found is not None, text
    return found[1]


def flags() -> list[str]:
    """Those of the build, from the CMake file that sets them."""
    text = (ROOT / "cmake" / "cuda.cmake").read_text()
    found = re.findall(r"(?:set\(|list\(APPEND )GUDA_FAST_CUDA_FLAGS ([^)]*)\)", text)
    assert len(found) == 2, "cmake/cuda.cmake sets GUDA_FAST_CUDA_FLAGS, and adds to it under GUDA_FAST_WERROR"
    return " ".join(found).split()


def demangle(name: str) -> str:
    """denoising_error_kernel<BFloat16, true, false>, from a mangled name."""
    found = re.match(r"_ZN9guda_fast7kernels(?:L|12_GLOBAL__N_1)?(\d+)(\w+)", name)
    assert found is not None, name
    kernel, rest = found[2][: int(found[1])], found[2][int(found[1]) :]
    arguments = re.findall(r"\d+(Float32|Float16|BFloat16)|Lb([01])E", rest) if rest.startswith("I") else []
    words = [element or ("true" if flag == "1" else "false") for element, flag in arguments]
    return f"{kernel}<{', '.join(words)}>" if words else kernel


def compile_source(nvcc: str, source: Path, target: int, folder: Path) -> tuple[list[dict[str, str]], list[str]]:
    """A row a kernel, and the inexact instructions of the PTX; raises with nvcc's words where it warns."""
    command = [nvcc, "-std=c++17", "-O3", *flags(), "-Xptxas=-v", f"-I{ROOT}", f"-I{ROOT / 'csrc'}", "-cubin"]
    command += [f"-arch=sm_{target}", "--keep", f"--keep-dir={folder}", "-o", str(folder / "out.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or "warning" in done.stderr:
        raise RuntimeError(f"{source.name} for sm_{target}:\n{done.stderr}")
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    rows = []
    for name, stack, stores, loads, registers, rest in pattern.findall(done.stderr):
        shared = re.search(r"(\d+) bytes smem", rest)
        values = (demangle(name), str(target), registers, shared[1] if shared else "0", stack, stores, loads)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    ptx = (folder / f"{source.stem}.ptx").read_text()
    return sorted(rows, key=lambda row: row["kernel"]), sorted(set(INEXACT.findall(ptx)))


def main(out: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("needs nvcc on PATH")
    with out.open("w", newline="") as file, tempfile.TemporaryDirectory() as folder:
        writer = csv.DictWriter(file, [*COLUMNS, "nvcc"], lineterminator="\n")
        writer.writeheader()
        for source in SOURCES:
            for target in TARGETS:
                rows, _ = compile_source(nvcc, source, target, Path(folder))
                writer.writerows({**row, "nvcc": nvcc_release(nvcc)} for row in rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
