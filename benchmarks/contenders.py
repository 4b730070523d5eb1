"""What several benchmarks measure against: the library's own kernels where this machine has them, and Inductor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from benchmarks.registry import Call, Contender
from guda_fast import _C
from guda_fast._backends import availability


def default_device() -> str:
    """Where factories put tensors now: the device type that a benchmark's cases are made for."""
    return torch.get_default_device().type


def architecture() -> str:
    """What the column instruction_set says of code that is not ours."""
    if default_device() == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    return torch.backends.cpu.get_cpu_capability()


def kernels(op: str, call: Callable[[str, int], object]) -> list[Contender]:
    """The op's kernels on this machine's GPU, or, where a GPU's benchmark is tried out on the CPU, in the interpreter.

    call: gets a backend's name and an input set's number
    """
    device = default_device()
    labels = {"cpp": _C.instruction_set(), "triton": "interpreter"} if device == "cpu" else {}
    return [
        Contender(name, labels.get(name, architecture()), lambda number, name=name: call(name, number))  # type: ignore[misc]
        for name in available_kernels(op, device)
    ]


@cache
def available_kernels(op: str, device: str) -> Sequence[str]:
    """The backends with kernels that serve the op here; says once what is missing and why."""
    table = {entry.backend: entry.reason for entry in availability() if entry.op == op and entry.device == device}
    wanted = ["triton", "cuda"] if device == "cuda" else ["triton", *({"cpp"} & table.keys())]
    for name in wanted:
        reason = table.get(name, f"it does not serve {device} tensors")
        if reason is not None:
            print(f"{op}: backend {name} is not measured: {reason}", file=sys.stderr)
    return [name for name in wanted if table.get(name, "absent") is None]


def inductor(function: Callable[..., Any], arguments: Callable[[int], tuple[Any, ...]], quick: bool) -> Contender:
    """`torch.compile` of a function for one shape; quick does not wait for the compiler.

    Reset first: past eight recompilations "compiled" silently means eager.
    """
    torch.compiler.reset()
    compiled = torch.compile(function, dynamic=False, fullgraph=True, backend="aot_eager" if quick else "inductor")
    call: Call = lambda number: compiled(*arguments(number))  # noqa: E731
    return Contender("compile", architecture(), call)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
