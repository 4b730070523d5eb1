"""The same scores from every backend of the noise ops, within a tolerance that follows from theirs."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

import guda_fast as gf
from guda_fast import _backends, reference
from tiny import Scaled

UNIT = 2.0**-24
SCHEDULER = DDPMScheduler(num_train_timesteps=100)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
OFFERED = [
    (line.device, line.backend)
    for line in _backends.availability()
    if line.op == "denoising_error" and line.device in DEVICES and line.reason is None
]
# Relative error of each sum of squares, given predictions and target (docs/kernels.md).
SUMS = {"reference": 2.0**-40, "cpp": 2.0**-40, "cuda": 2.0**-40, "triton": 16.1 * UNIT}


@pytest.mark.parametrize(("device", "backend"), OFFERED)
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 7, 5)])
def test_scores(device: str, backend: str, shape: tuple[int, int, int]) -> None:
    """Models that predict f x_t: a change d of the normals changes f x_t - eps by (1 + f) d at most."""
    if device == "cpu" and backend == "triton" and _backends.triton_device_reason(torch.device("cpu")):
        pytest.skip("triton takes CPU tensors in its interpreter alone")
    x0 = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0)) * 2 - 1
    timesteps, factors = (20, 50, 80), (0.0, 0.5, -0.25)
    protocol = gf.Protocol(gf.Schedule.from_scheduler(SCHEDULER), timesteps, weighting="simple")
    bank = gf.DeltaBank.load(Scaled(factors[0]), {str(f): Scaled(f) for f in factors[1:]}, scheduler=SCHEDULER)
    with _backends.use_backend(backend):
        found = gf.attribute(x0, bank, protocol, ids=[5, -7 % 2**64], device=device).scores
    elements = x0[0].numel()
    signal, sigma = protocol.schedule.scales(list(timesteps))
    expected, slack = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    for i, query_id in enumerate((5, -7)):
        for t, a, b in zip(timesteps, signal, sigma, strict=True):
            counters = torch.tensor([query_id]), torch.tensor([t]), torch.tensor([0])
            eps = reference.standard_normals(*counters, elements, seed=protocol.seed, dtype=torch.float64)[0]
            x_t = a * x0[i].flatten().double() + b * eps
            errors, bounds = [], []
            for factor in factors:
                residual = factor * x_t - eps
                # The normals are off by 4e-6, and x_t, f x_t and the difference round float32 values below 8 each.
                off = (1 + abs(factor)) * 4e-6 + 4 * UNIT * 8
                errors.append((residual**2).sum())
                bounds.append(2 * off * residual.abs().sum() + elements * off**2 + SUMS[backend] * errors[-1])
            for k in (0, 1):
                expected[i, k] += errors[k + 1] - errors[0]
                slack[i, k] += bounds[k + 1] + bounds[0]
    assert ((torch.from_numpy(found) - expected).abs() <= slack).all()
    assert (slack < 1e-3 * expected.abs().max()).all()
