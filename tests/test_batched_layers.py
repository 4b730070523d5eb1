"""Layers of every kind that a batched model routes, each in all ways it can be set up."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers.models import normalization
from torch import Tensor, nn

from guda_fast.deltas import DeltaBank
from guda_fast.deltas.delta import Delta
from guda_fast.forward._routing import RowModels
from guda_fast.forward.batched import BatchedModel
from test_batched import as_on_a_gpu, exact, randomised, rms, size, some_delta

IMAGES: dict[str, Callable[[], nn.Module]] = {
    "grouped": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2),
    "dilated, strided, tall": lambda: nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
    "circular": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "same": lambda: nn.Conv2d(4, 4, 3, padding="same", bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "group norm without parameters": lambda: nn.Sequential(nn.GroupNorm(2, 4, affine=False), nn.Conv2d(4, 4, 1)),
}
TOKENS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 6, bias=False),
    "layer norm": lambda: nn.LayerNorm((6, 4)),
    "float32 layer norm": lambda: normalization.FP32LayerNorm(4),
    "rms norm": lambda: nn.RMSNorm(4),
    "diffusers' rms norm": lambda: normalization.RMSNorm(4, 1e-5, bias=True),
}
KINDS = {**IMAGES, **TOKENS}


class Around(nn.Module):
    """One layer of the kind, on images or tokens, and an embedding of the timestep."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.steps = nn.Conv2d(4, 4, 1), layer, nn.Embedding(100, 1)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        x = self.first(sample) + self.steps(timestep)[:, :, None, None]
        return (self.layer(x),)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("forms", [["dense"], ["low-rank"], ["absent", "dense", "low-rank"]])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_every_kind(monkeypatch: pytest.MonkeyPatch, kind: str, forms: list[str], stacked: bool) -> None:
    if stacked:
        as_on_a_gpu(monkeypatch)
    base = randomised(lambda: Around(KINDS[kind]()))
    deltas: list[Delta | None] = [None, *(some_delta(base, forms, seed) for seed in range(3))]
    bank = DeltaBank.load(
        base, {str(k): delta for k, delta in enumerate(deltas) if delta is not None}, allow_identical=True
    )
    models, samples = [3, 1, 0, 0, 1, 2], [0, 0, 0, 1, 1, 1]
    images = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for dtype in (torch.float64, torch.bfloat16):
        bank.to(dtype=dtype, memory_format=torch.channels_last)
        x = images.to(dtype)[samples].contiguous(memory_format=torch.channels_last)
        timestep = torch.tensor([3, 7])[samples]
        found = BatchedModel(bank, example=(x, timestep, {}))(x, timestep, RowModels(models, samples, timestep))
        with torch.no_grad():
            networks = [exact(base, delta) for delta in deltas]
            rival = [copy.deepcopy(network).to(dtype) for network in networks]
            expected, alone = (
                torch.cat([each[m](x[r : r + 1].to(of), timestep[r : r + 1])[0] for r, m in enumerate(models)])
                for each, of in ((networks, torch.float64), (rival, dtype))
            )
        if dtype == torch.float64:
            # Norms that compute in float32 round to it, from inputs that differ in their last bits.
            tolerance = 1e-6 if kind in ("float32 layer norm", "diffusers' rms norm") else 1e-14
            assert size(found - expected) <= tolerance * size(expected)
        else:
            assert rms(found - expected) <= 2 * rms(alone - expected)
