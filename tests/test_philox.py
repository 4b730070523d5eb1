"""The noise contract: words, uniforms, normals, and their statistics, on every backend that makes noise."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from guda_fast import _backends, ops, reference

NORMAL_TOLERANCE = 4e-6  # the noise contract's, against the float64 value of the same uniforms


def plain_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers, written from the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32)
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def plain_words(seed: int, query_id: int, timestep: int, sample: int, block: int) -> tuple[int, ...]:
    identity = query_id % 2**64
    counter = (block, timestep + 65536 * sample, identity % 2**32, identity // 2**32)
    return plain_philox(counter, (seed % 2**32, seed // 2**32))


def plain_normal(seed: int, query_id: int, timestep: int, sample: int, element: int) -> float:
    words = plain_words(seed, query_id, timestep, sample, element // 4)
    first = 2 * (element % 4 // 2)
    u_a, u_b = (((word // 512) + 0.5) / 2**23 for word in words[first : first + 2])
    function = math.sin if element % 2 else math.cos
    return math.sqrt(-2 * math.log(u_a)) * function(2 * math.pi * u_b)


def noise(
    elements: int, query_id: Tensor, timestep: Tensor, sample: Tensor, *, seed: int, antithetic: bool = False
) -> Tensor:
    """Pure noise through the public op, on the backend in use."""
    rows = query_id.shape[0]
    zero, index = torch.zeros(rows), torch.zeros(rows, dtype=torch.int64)
    x0 = torch.zeros(1, elements)
    draw = (query_id, timestep, sample)
    return ops.add_noise(x0, index, *draw, zero, zero + 1, seed=seed, antithetic=antithetic)


def draws(rows: int, query_id: int = 0, timestep: int = 0, sample: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.full((rows,), value) for value in (query_id, timestep, sample))  # type: ignore[return-value]


# Random123's kat_vectors for philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in reference.philox4x32((c0, c1, c2, c3), key)) == words
    assert plain_philox(counter, key) == words


SEEDS = [0, 1, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1]
IDS = [0, 1, -1, -(2**63), 2**63 - 1, 0x0123456789ABCDEF]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first_block", [0, 3, 2**31 - 2, 2**32 - 4])
def test_words_equal_plain_integers(seed: int, first_block: int) -> None:
    timestep, sample = [0, 65535, 1, 999, 40, 2], [65535, 0, 1, 7, 40, 3]
    words = reference.noise_words(
        *map(torch.tensor, (IDS, timestep, sample)), seed=seed, first_block=first_block, blocks=4
    )
    expected = [
        [plain_words(seed, *row, block) for block in range(first_block, first_block + 4)]
        for row in zip(IDS, timestep, sample, strict=True)
    ]
    assert torch.equal(words, torch.tensor(expected))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("query_id", IDS)
def test_extension_words_equal_reference(seed: int, query_id: int) -> None:
    native = _backends.native()
    if native is None:
        pytest.skip(str(_backends.native_unavailable()))
    for first_block, blocks in ((0, 1), (0, 1027), (2**32 - 33, 33)):
        row = draws(1, query_id, 65535, 40000)
        expected = reference.noise_words(*row, seed=seed, first_block=first_block, blocks=blocks)
        for name in native.instruction_sets():
            words = torch.full((blocks, 4), -1, dtype=torch.int32)
            with _backends.use_instruction_set(name):
                native.noise_words(words.data_ptr(), blocks, first_block, query_id, 65535, 40000, seed)
            assert torch.equal(words.long() & 0xFFFFFFFF, expected[0]), name


def test_uniforms_are_exact_in_float32_and_inside_the_unit_interval() -> None:
    words = torch.tensor([0, 511, 512, 2**31, 2**32 - 1])
    assert torch.equal(reference.uniforms(words).double(), reference.uniforms(words, torch.float64))
    assert reference.uniforms(words).min() == 2.0**-24
    assert reference.uniforms(words).max() == 1 - 2.0**-24


def test_float64_normals_equal_plain_python() -> None:
    seed, query_id, timestep, sample = 2**64 - 3, -5, 321, 9
    row = draws(1, query_id, timestep, sample)
    values = reference.standard_normals(*row, 1001, seed=seed, dtype=torch.float64)
    expected = [plain_normal(seed, query_id, timestep, sample, element) for element in range(1001)]
    # A few roundings of numbers below 6, and of an angle below 2 pi: under 50 ulp of 1.
    torch.testing.assert_close(values[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=50 * 2.0**-52)


@pytest.mark.parametrize("fixed", [0, 1, 5, 2**22, 2**23 - 2, 2**23 - 1])
def test_reference_normals_are_within_the_contract_over_all_angles(fixed: int) -> None:
    sweep = torch.arange(0, 2**23, 37) << 9
    other = torch.full_like(sweep, fixed << 9)
    words = torch.stack((other, sweep, sweep, other), dim=-1)
    error = (reference.normals(words).double() - reference.normals(words, torch.float64)).abs().max()
    assert error <= NORMAL_TOLERANCE


def test_normals_are_within_the_contract(backend: str) -> None:
    row = (torch.tensor([3, -1]), torch.tensor([10, 65535]), torch.tensor([0, 1]))
    values = noise(2**18 + 3, *row, seed=2**63 + 1)
    exact = reference.standard_normals(*row, 2**18 + 3, seed=2**63 + 1, dtype=torch.float64)
    assert (values.double() - exact).abs().max() <= NORMAL_TOLERANCE


def test_a_row_is_the_same_whatever_its_length_and_company(backend: str) -> None:
    row = (torch.arange(40) * 11 - 200, torch.arange(40) * 7, torch.arange(40) % 3)
    long = noise(4099, *row, seed=5)
    for elements in (1, 2, 3, 4, 5, 17, 4095, 4096, 4097):
        assert torch.equal(noise(elements, *row, seed=5), long[:, :elements])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise(4099, *(values[order] for values in row), seed=5), long[order])
    alone = torch.cat([noise(4099, *(values[r : r + 1] for values in row), seed=5) for r in range(40)])
    assert torch.equal(alone, long)


def test_antithetic_negates_the_even_sample(backend: str) -> None:
    row = (torch.tensor([5, 5, 5, 5]), torch.full((4,), 17), torch.tensor([6, 7, 8, 65535]))
    plain = noise(101, *row, seed=3)
    paired = noise(101, *row, seed=3, antithetic=True)
    assert torch.equal(paired[0], plain[0])
    assert torch.equal(paired[1], -plain[0])
    assert torch.equal(paired[2], plain[2])
    last_even = noise(101, *draws(1, 5, 17, 65534), seed=3)
    assert torch.equal(paired[3], -last_even[0])


def test_moments_and_distribution_of_a_million_normals(backend: str) -> None:
    n = 2**20
    values = noise(n // 16, torch.arange(16), *draws(16)[1:], seed=42).double().flatten()
    # Five standard deviations of each sample moment of a standard normal.
    assert abs(values.mean()) < 5 / math.sqrt(n)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((values**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    # Box-Muller's pairs and their neighbours are uncorrelated, also in their squares.
    blocks = values.view(-1, 4)
    correlation = torch.corrcoef(torch.cat((blocks, blocks**2), dim=1).T) - torch.eye(8)
    assert correlation.abs().max() < 5 / math.sqrt(n / 4)


@pytest.mark.parametrize("varied", ["query_id", "query_id_high", "timestep", "sample", "seed"])
def test_rows_that_differ_in_one_counter_are_independent(varied: str) -> None:
    rows, elements = 12, 2**14
    step = torch.arange(rows)
    row = list(draws(rows, 77, 100, 2))
    if varied == "seed":
        values = torch.cat([noise(elements, *draws(1, 77, 100, 2), seed=2**31 * s) for s in range(rows)])
    else:
        position = ["query_id", "timestep", "sample"].index(varied.removesuffix("_high"))
        row[position] = row[position] + (step << 32 if varied == "query_id_high" else step)
        values = noise(elements, *row, seed=9)
    values = values.double()
    # 66 pairs at each of 3 shifts: the largest |correlation| exceeds 5 sigma once in 8,000 such tests.
    for shift in (0, 1, 2):
        stacked = torch.cat((values, values.roll(shift, dims=1))) if shift else values
        correlation = torch.corrcoef(stacked) - torch.eye(len(stacked))
        assert correlation.abs().max() < 5 / math.sqrt(elements)
