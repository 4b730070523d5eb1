"""Peak memory of a call, counted tensor by tensor."""

from __future__ import annotations

import pytest
import torch

from guda_fast.forward import fuse
from guda_fast.forward.activations import peak_bytes
from tiny import tiny_unet

KIB = 1024


def chain() -> torch.Tensor:
    x = torch.zeros(KIB // 4)
    for _ in range(5):
        x = x + 1  # the old one lives until the new one is there
    return x


def views_and_in_place() -> torch.Tensor:
    x = torch.zeros(KIB // 4)
    return x.view(2, -1).t().add_(1)[1:].mul_(2)


def into_given_memory() -> None:
    x = torch.zeros(KIB // 4)
    torch.add(x, 1, out=x)


def kept() -> list[torch.Tensor]:
    return [torch.zeros(KIB // 4) for _ in range(3)]


@pytest.mark.parametrize(
    ("call", "expected"), [(chain, 2), (views_and_in_place, 1), (into_given_memory, 1), (kept, 3), (lambda: None, 0)]
)
def test_what_lives_at_one_time_is_counted(call: object, expected: int) -> None:
    assert peak_bytes(call) == expected * KIB  # type: ignore[arg-type]


@torch.inference_mode()
def test_activations_of_a_network_grow_with_its_rows() -> None:
    model = fuse(tiny_unet().to(memory_format=torch.channels_last))

    def peak(rows: int) -> int:
        x_t = torch.zeros(rows, 1, 8, 8).contiguous(memory_format=torch.channels_last)
        return peak_bytes(lambda: model(x_t, torch.zeros(rows, dtype=torch.int64)))

    widest = 8 * (8 + 16) * 8 * 4  # the input of the last block's first convolution, at 8 x 8
    assert peak(1) > widest
    assert peak(8) == pytest.approx(8 * peak(1), rel=0.02)  # some tensors have no rows
