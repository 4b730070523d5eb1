"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

from guda_fast import _backends
from guda_fast.cli import main

# Triton reads this when a kernel is defined: without a GPU its interpreter runs them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_NATIVE = _backends.native()
_CPP = ["cpp"] if _NATIVE is None else [f"cpp-{name}" for name in _NATIVE.instruction_sets()]


@pytest.fixture(params=["reference", *_CPP])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for the reference and once for each instruction set of the extension."""
    name, _, instruction_set = request.param.partition("-")
    if name == "cpp" and _NATIVE is None:
        pytest.skip(str(_backends.native_unavailable()))
    with ExitStack() as stack:
        stack.enter_context(_backends.use_backend(name))
        if instruction_set:
            stack.enter_context(_backends.use_instruction_set(instruction_set))
        yield name


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs a guda-fast command line in an empty folder; returns the exit status and everything it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["guda-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out + captured.err

    return run


@pytest.fixture
def make_rows() -> Callable[..., tuple[Tensor, ...]]:
    """The tensors that both noise ops take, from x0 to eps_scale, with random contents."""

    def make(
        rows: int, shape: tuple[int, ...], queries: int = 3, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(rows + 7 * len(shape))
        return (
            torch.randn((queries, *shape), generator=random, dtype=dtype),
            torch.randint(queries, (rows,), generator=random),
            torch.randint(-(2**63), 2**63 - 1, (rows,), generator=random),
            torch.randint(65536, (rows,), generator=random),
            torch.randint(65536, (rows,), generator=random),
            torch.rand(rows, generator=random, dtype=dtype),
            torch.rand(rows, generator=random, dtype=dtype),
        )

    return make
