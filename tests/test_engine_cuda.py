"""The engine on a GPU: captured graphs, prefetched deltas and both plans, against float64 on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

import guda_fast as gf
from guda_fast.forward import POLICIES, Engine, Rows
from tiny import perturbed, tiny_unet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPE = (3, 16, 16)
PROTOCOL = gf.Protocol.from_scheduler(DDPMScheduler(num_train_timesteps=100), start=5, stride=20)


@pytest.fixture(scope="module")
def models() -> list[nn.Module]:
    base = perturbed(tiny_unet(3, size=16), 0.05, seed=9)
    return [base, *(perturbed(base, 0.03, seed=seed) for seed in (1, 2, 3))]


def bank_of(models: list[nn.Module]) -> gf.DeltaBank:
    return gf.DeltaBank.load(models[0], {f"g{k}": model for k, model in enumerate(models[1:])})


@pytest.mark.parametrize("plan", ["swap", "batched"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("tf32", 1e-2), ("fp16", 1e-2), ("bf16", 5e-2)])
def test_errors_are_those_of_float64(models, plan: str, precision: str, tolerance: float) -> None:
    """Relative to the largest error; a float32 forward is off by about 1e-6, the others by their mantissas' ends."""
    x0 = torch.rand((3, *SHAPE), generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = Rows.product(3, [0, 1, 2, 3], PROTOCOL.draws)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]
    found, expected = (
        engine.errors(engine.queries(x0, [1, 2, 3]), rows)
        for engine in (
            Engine(
                bank_of(models), PROTOCOL, SHAPE, device="cuda", precision=POLICIES[precision], batch_size=7, plan=plan
            ),
            Engine(bank_of(models), PROTOCOL, SHAPE, precision=POLICIES["fp64"], batch_size=64, plan="swap"),
        )
    )
    np.testing.assert_allclose(found, expected, atol=tolerance * expected.max(), rtol=0)


def test_one_graph_a_size_serves_all_models(models) -> None:
    bank = bank_of(models)
    engine = Engine(bank, PROTOCOL, SHAPE, device="cuda", batch_size=8, plan="swap")
    pointers = {name: p.data_ptr() for name, p in bank.model.named_parameters()}
    queries = engine.queries(torch.zeros(5, *SHAPE), range(5))
    for _ in range(2):
        engine.errors(queries, Rows.product(5, [0, 1, 2, 3], PROTOCOL.draws))
    assert {name: p.data_ptr() for name, p in bank.model.named_parameters()} == pointers
    assert sorted(key[0][1][0] for key in engine.swap.forward._graphs) == [1, 8]  # 25 rows are 3 x 8 + 1


def test_both_switches_for_float32_products_come_back(models) -> None:
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    engine = Engine(bank_of(models), PROTOCOL, SHAPE, device="cuda", precision=POLICIES["tf32"], batch_size=8)
    engine.errors(engine.queries(torch.zeros(1, *SHAPE), [0]), Rows.product(1, [0, 1], 2))
    assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision) == before
