"""The batched plan: whether it would fit the memory."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from guda_fast.deltas import Delta, DeltaBank, Dense, LowRank
from guda_fast.errors import BatchedUnavailableError
from guda_fast.forward.batched import BatchedModel
from guda_fast.forward.batched_plan import _check_memory
from test_batched import randomised, unet


@pytest.mark.parametrize(
    ("forms", "dtype", "as_factors"),
    [
        ((LowRank,), torch.bfloat16, True),
        ((LowRank,), torch.float32, False),  # small weights are merged there
        ((LowRank, Dense), torch.bfloat16, False),
    ],
)
def test_low_rank_differences_count_as_what_they_take(
    forms: tuple[type, ...], dtype: torch.dtype, as_factors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = randomised(unet)
    weights = {name: value for name, value in base.named_parameters() if value.dim() > 1}
    random = torch.Generator().manual_seed(0)

    def part(form: type, value: torch.Tensor) -> LowRank | Dense:
        full = torch.randn(value.shape, generator=random) * 0.1
        return LowRank(full.flatten(1)[:, :1], full[:1]) if form is LowRank else Dense(full)

    groups = {f"g{k}": forms[k % len(forms)] for k in range(20)}
    deltas = {name: Delta({key: part(form, value) for key, value in weights.items()}) for name, form in groups.items()}
    bank = DeltaBank.load(base, deltas).to(dtype=dtype)
    rehearsal = 4 * 8 * sum(parameter.numel() for parameter in base.parameters())
    taken = BatchedModel(bank).bytes
    whole = len(groups) * sum(value.numel() for value in weights.values()) * dtype.itemsize
    assert (taken < whole / 4) == as_factors
    between = rehearsal + (whole // 2 if as_factors else taken // 2)
    monkeypatch.setattr("guda_fast.forward.batched_plan.free_bytes", lambda device: 2 * between)
    with nullcontext() if as_factors else pytest.raises(BatchedUnavailableError, match="of which half may be used"):
        _check_memory(bank)
    monkeypatch.setattr("guda_fast.forward.batched_plan.free_bytes", lambda device: 2 * rehearsal)
    with pytest.raises(BatchedUnavailableError, match="the parameters of all groups take"):
        _check_memory(bank)
