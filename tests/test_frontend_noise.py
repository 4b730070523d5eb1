"""Noise from elsewhere than the contract: what models see of it, and generators that are seeded batch by batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import guda_fast as gf
from guda_fast import reference
from guda_fast.diffusion import GivenNoise, SeededNoise
from guda_fast.forward.noised import NoisedQueries

IDS = (3, 2**64 - 1, 5)
SHAPE = (2, 3, 5)


def contract_noise(protocol: gf.Protocol, dtype: torch.dtype) -> torch.Tensor:
    """The contract's normals of every query and draw [(N, D, *SHAPE)]."""
    table = protocol.table
    ids = torch.from_numpy(np.array(IDS, dtype=np.uint64).view(np.int64)).repeat_interleave(protocol.draws)
    timestep = torch.from_numpy(table.timestep).repeat(len(IDS))
    sample = torch.from_numpy(table.sample).repeat(len(IDS))
    count = int(np.prod(SHAPE))
    normals = reference.standard_normals(ids, timestep, sample, count, seed=protocol.seed, dtype=dtype)
    return normals.reshape(len(IDS), protocol.draws, *SHAPE)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_contracts_own_noise_gives_what_the_contract_gives(prediction_type: str, dtype: torch.dtype) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=prediction_type)
    protocol = gf.Protocol.from_scheduler(scheduler, start=7, stride=13, samples=2)
    x0 = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    arguments = {"device": torch.device("cpu"), "dtype": dtype}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    source = GivenNoise(contract_noise(protocol, wide).float())
    query = torch.arange(3).repeat_interleave(protocol.draws)
    draw = torch.arange(protocol.draws).repeat(3)
    fused = NoisedQueries(x0, IDS, protocol, **arguments).batch(query, draw)
    ours = NoisedQueries(x0, IDS, protocol, **arguments, noise=source).batch(query, draw)
    # Normals of the ops are within 4e-6 of the float64 ones (kernels/NOISE.md), ours rounded to float32 once; what a
    # narrower dtype rounds may then fall to the other side.
    rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(ours.x_t(), fused.x_t(), atol=1e-5, rtol=rounding, check_stride=True)
    prediction = torch.randn(len(query), *SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.testing.assert_close(ours.errors(prediction), fused.errors(prediction), rtol=1e-5, atol=0)


def test_errors_follow_the_given_noise_beyond_one_chunk() -> None:
    protocol = gf.Protocol.from_scheduler(DDPMScheduler(num_train_timesteps=300), start=1, weighting="simple")
    x0 = torch.zeros(1, *SHAPE)
    values = torch.arange(protocol.draws, dtype=torch.float32).reshape(1, -1, 1, 1, 1).expand(1, -1, *SHAPE)
    queries = NoisedQueries(
        x0, [0], protocol, device=torch.device("cpu"), dtype=torch.float32, noise=GivenNoise(values.bfloat16())
    )
    draw = torch.arange(protocol.draws)
    found = queries.batch(torch.zeros_like(draw), draw).errors(torch.zeros(len(draw), *SHAPE))
    expected = draw.float().bfloat16().double().square() * values[0, 0].numel()
    assert torch.equal(found, expected)


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    order=st.permutations(range(5)),
    data=st.data(),
)
def test_seeded_noise_is_that_of_a_loop_over_batches(sizes: list[int], order: list[int], data: st.DataObject) -> None:
    seeds = list(range(10, 10 + len(sizes)))
    expected = torch.empty(sum(sizes), 5, 1, 2, 3)
    for batch, (seed, size) in enumerate(zip(seeds, sizes, strict=True)):
        torch.manual_seed(seed)
        first = sum(sizes[:batch])
        for draw in order:
            expected[first : first + size, draw] = torch.randn(size, 1, 2, 3)
    source = SeededNoise(seeds, sizes, order=order, shape=(1, 2, 3), device="cpu")
    for _ in range(3):
        pairs = st.tuples(st.integers(0, sum(sizes) - 1), st.integers(0, 4))
        rows = torch.tensor(data.draw(st.lists(pairs, min_size=1, max_size=12)))
        assert torch.equal(source.noise(rows[:, 0], rows[:, 1]), expected[rows[:, 0], rows[:, 1]])


def test_rows_in_the_generators_order_cost_one_randn_each(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: made.append(1) or randn(*args, **kwargs))
    source = SeededNoise([1, 2], [3, 2], order=[3, 2, 1, 0], shape=(1, 1, 4), device="cpu")
    for queries in ([0, 1, 2], [3, 4]):
        for draw in (3, 2, 1, 0):
            for query in queries:
                source.noise(torch.tensor([query]), torch.tensor([draw]))
    assert len(made) == 2 * 4


class Wrong:
    def noise(self, query: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, *SHAPE)


def test_bad_arguments() -> None:
    protocol = gf.Protocol.from_scheduler(DDPMScheduler(num_train_timesteps=100))
    device = torch.device("cpu")
    queries = NoisedQueries(torch.zeros(1, *SHAPE), [0], protocol, device=device, dtype=torch.float32, noise=Wrong())
    with pytest.raises(ValueError, match=r"NoiseSource: noise must have shape \(2, 2, 3, 5\), got float32 tensor"):
        queries.batch(torch.zeros(2, dtype=torch.int64), torch.arange(2))
    with pytest.raises(TypeError, match="GivenNoise: values must be float32 or bfloat16 or float16"):
        GivenNoise(torch.zeros(1, 1, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"GivenNoise: draw must be in \[0, 4\), got 4 at row 0"):
        GivenNoise(torch.zeros(3, 4, 2)).noise(torch.tensor([0]), torch.tensor([4]))
    with pytest.raises(ValueError, match=r"SeededNoise: sizes must hold one size a seed \(1\), got 2"):
        SeededNoise([1], [1, 2], order=[0], shape=(1,), device="cpu")
    with pytest.raises(ValueError, match=r"SeededNoise: order must be a permutation of 0..1, got \[0, 2\]"):
        SeededNoise([1], [1], order=[0, 2], shape=(1,), device="cpu")
    source = SeededNoise([1], [2], order=[0], shape=(1,), device="cpu")
    with pytest.raises(ValueError, match=r"SeededNoise: query must be in \[0, 2\), got 2 at row 0"):
        source.noise(torch.tensor([2]), torch.tensor([0]))
