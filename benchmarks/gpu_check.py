"""Every op on every kernel of this machine's GPU, once, on small odd shapes, against the definition on the CPU.

``python -m benchmarks.gpu_check``: short enough for compute-sanitizer, and all that checks where pytest is absent. The
bounds are wide: a wrong kernel is wrong by more, and the tests have the derived ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.contenders import available_kernels
from guda_fast.ops import add_noise, delta_conv2d, delta_linear, denoising_error, group_norm_silu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# The largest error, relative to the largest value.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

Run = Callable[[str, str], Tensor]
"""Gets a device and a backend."""


def _moved(tensors: tuple[Tensor, ...], device: str) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


def _noise(dtype: torch.dtype, channels_last: bool) -> Iterator[tuple[str, Run]]:
    rows, shape = 3, (3, 9, 7)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x0 = torch.randn(2, *shape).to(memory_format=layout)
    counters = (torch.tensor([0, 1, 1]), torch.tensor([-1, 5, 2**60]), torch.tensor([0, 65535, 7]), torch.arange(3))
    scales, weight = (torch.rand(rows), torch.rand(rows)), torch.rand(rows, dtype=torch.float64)
    predictions = torch.randn(2 * rows, *shape).to(dtype=dtype, memory_format=layout).unflatten(0, (2, rows))
    tensors = (x0, *counters, *scales)

    def noised(device: str, backend: str) -> Tensor:
        return add_noise(*_moved(tensors, device), seed=2**64 - 1, backend=backend)

    def error(device: str, backend: str) -> Tensor:
        arguments = _moved((predictions, *tensors, weight), device)
        result = denoising_error(*arguments, seed=3, antithetic=True, paired=True, backend=backend)
        assert result.paired is not None
        return torch.stack((result.errors, result.paired))

    if dtype == torch.float32:
        yield "add_noise", noised
    yield "denoising_error", error


def _group_norm(dtype: torch.dtype, channels_last: bool) -> Iterator[tuple[str, Run]]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(3, 12, 9, 7).to(dtype=dtype, memory_format=layout)
    vectors = (torch.randn(2, 12), torch.randn(2, 12), torch.randn(3, 12), torch.tensor([1, 0, 1]))

    def run(device: str, backend: str) -> Tensor:
        weight, bias, addend, index = _moved(vectors, device)
        return group_norm_silu(x.to(device), 4, weight, bias, addend=addend, model_index=index, backend=backend)

    yield "group_norm_silu", run


def _deltas(dtype: torch.dtype, channels_last: bool) -> Iterator[tuple[str, Run]]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(7, 5, 6, 6).to(dtype=dtype, memory_format=layout)
    weight, delta = torch.randn(9, 5, 3, 3).to(dtype), torch.randn(3, 9, 5, 3, 3).to(dtype)
    up, down, offsets = torch.randn(3, 9, 2).to(dtype), torch.randn(3, 2, 6).to(dtype), torch.tensor([0, 4, 4, 7])
    product = torch.randn(9, 6).to(dtype)

    def conv(device: str, backend: str) -> Tensor:
        moved, base, change, bounds = _moved((x, weight, delta, offsets), device)
        return delta_conv2d(moved, base, offsets=bounds, delta=change, stride=2, padding=1, backend=backend)

    def linear(device: str, backend: str) -> Tensor:
        moved, base, left, right, bounds = _moved((x, product, up, down, offsets), device)
        return delta_linear(moved, base, offsets=bounds, up=left, down=right, backend=backend)

    yield "delta_conv2d", conv
    yield "delta_linear", linear


def main() -> int:
    """How many checks failed; prints a line for each."""
    torch.manual_seed(0)
    failures = 0
    for dtype, bound in BOUNDS.items():
        for channels_last in (False, True):
            for make in (_noise, _group_norm, _deltas):
                for op, run in make(dtype, channels_last):
                    for backend in available_kernels(op, DEVICE):
                        if (op, backend, channels_last) == ("group_norm_silu", "cpp", False):
                            continue  # cpp takes channels-last alone
                        expected = run("cpu", "reference").double()
                        error = (run(DEVICE, backend).cpu().double() - expected).abs().max() / expected.abs().max()
                        wrong = not bool(error <= bound)
                        failures += wrong
                        layout = "channels-last" if channels_last else "contiguous"
                        print(f"{'WRONG' if wrong else 'right'} {op} {backend} {dtype} {layout}: {float(error):.1e}")
    return failures


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
