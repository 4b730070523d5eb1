"""What the tests of both native noise ops share: their definition in float64, memory layouts, and refused calls."""

from __future__ import annotations

from typing import Any

import torch

from guda_fast import _C
from native_calls import Rows, box_muller, native_words

SETS = _C.instruction_sets()
SIZES = [1, 2, 3, 5, 15, 16, 17, 63, 64, 65, 105, 4095, 4096, 4097, 12289]

# What the C++ kernels refuse and those on a device cannot, beside what test_native_refusals.py lists for both.
HOST_REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
    ({"queries": 1}, IndexError, "query_index must be between 0 and 0, got 1 in row 1"),
    ({"queries": 0}, IndexError, "query_index must be between 0 and -1, got 0 in row 0"),
]


def plain_noise(rows: Rows, elements: int, seed: int, antithetic: bool = False) -> torch.Tensor:
    """The float64 noise of every row from the words of the contract."""
    noise = []
    for query_id, timestep, sample in zip(
        rows.query_id.tolist(), rows.timestep.tolist(), rows.sample.tolist(), strict=True
    ):
        odd = antithetic and sample % 2 == 1
        words = native_words(range((elements + 3) // 4), query_id, timestep, sample - odd, seed)
        noise.append(torch.from_numpy((-1.0 if odd else 1.0) * box_muller(words)[:elements]))
    return torch.stack(noise) if noise else torch.empty(0, elements, dtype=torch.float64)


def plain_noised(x0: torch.Tensor, rows: Rows, **options: Any) -> torch.Tensor:
    eps = plain_noise(rows, x0[0].numel(), options.pop("seed", 7), **options).reshape(-1, *x0.shape[1:])
    column = (-1,) + (1,) * (x0.dim() - 1)
    chosen = x0[rows.query_index].double()
    return rows.x0_scale.double().view(column) * chosen + rows.eps_scale.double().view(column) * eps


def noised_tolerance(x0: torch.Tensor) -> float:
    # 4e-6 for the noise (scales are below 1), and three float32 roundings of values below the sum's bound
    # |x0| + 5.8: the largest normal is sqrt(-2 ln 2**-24) = 5.77.
    return 4e-6 + 3 * 2.0**-24 * (float(x0.abs().max()) + 5.8)


def unit_noise_rows(query_id: int = 5, timestep: int = 3) -> Rows:
    rows = Rows(1, 1)
    rows.query_id.fill_(query_id)
    rows.timestep.fill_(timestep)
    rows.sample.zero_()
    rows.x0_scale.zero_()
    rows.eps_scale.fill_(1.0)
    return rows


def refusal_rows() -> Rows:
    rows = Rows(2, 2)
    rows.query_index[:] = torch.tensor([0, 1])
    return rows


def views_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The same values in other memory layouts."""
    order = [0, *range(2, tensor.dim()), 1] if tensor.dim() > 2 else list(range(tensor.dim()))
    inverse = [order.index(dim) for dim in range(tensor.dim())]
    channels_last = tensor.permute(order).contiguous().permute(inverse)
    stepped = torch.zeros(*(2 * size for size in tensor.shape))[(slice(None, None, 2),) * tensor.dim()]
    wide = torch.zeros(tensor.shape[0], 2 * tensor.shape[1], *tensor.shape[2:])[:, : tensor.shape[1]]
    reversed_dims = tensor.permute(*reversed(range(tensor.dim()))).contiguous()
    transposed = reversed_dims.permute(*reversed(range(tensor.dim())))
    return [tensor.clone(), channels_last, stepped.copy_(tensor), wide.copy_(tensor), transposed]
