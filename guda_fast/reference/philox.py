"""The noise contract, version 1: standard normals as a pure function of counters.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011), then
Box-Muller.
Words are kept in int64 tensors with values in [0, 2**32), so that every product fits and no step overflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF

# Elements made at once. The words of one element and their temporaries take about 60 bytes, so this stays
# near 16 MiB whatever the size of a row.
TILE_ELEMENTS = 2**18


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random words for each counter.

    Ten rounds of (c0, c1, c2, c3) -> (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)).

    counter: four words that broadcast together [int64 in 0..2**32-1]
    key: two words [0..2**32-1]

    Returns four int64 tensors of words.
    Source: Salmon et al. 2011, section 3.3.

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [hex(word) for word in torch.cat(philox4x32((zero, zero, zero, zero), (0, 0))).tolist()]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK32, (k1 + KEY_INCREMENTS[1]) & MASK32
    return c0, c1, c2, c3


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * word, by 16-bit halves: a 64-bit product would overflow int64."""
    low = word * (constant & 0xFFFF)
    high = word * (constant >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def noise_words(
    query_id: Tensor, timestep: Tensor, sample: Tensor, *, seed: int, first_block: int, blocks: int
) -> Tensor:
    """The words of element blocks [first_block, first_block + blocks) of R rows.

    Key: low and high half of the seed. Counter: block, timestep | sample << 16, low and high half of the id.

    query_id: the bits of the uint64 id [(R,), int64]
    timestep, sample: [(R,), int64, 0..65535]
    seed: [0..2**64-1]
    first_block, blocks: range of blocks, four elements each

    Returns words [(R, blocks, 4), int64 in 0..2**32-1].
    Source: kernels/NOISE.md.
    """
    block = torch.arange(first_block, first_block + blocks, dtype=torch.int64, device=query_id.device)
    draw = (timestep | (sample << 16))[:, None]
    identity = query_id[:, None]
    # The arithmetic shift of a negative id leaves ones above bit 31, which the mask removes.
    counter = (block[None, :], draw, identity & MASK32, (identity >> 32) & MASK32)
    words = philox4x32(counter, (seed & MASK32, seed >> 32))
    return torch.stack(words, dim=-1)


def uniforms(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers strictly between 0 and 1: ((w >> 9) + 0.5) * 2**-23, exact in float32.

    >>> uniforms(torch.tensor([0, 2**32 - 1])).tolist() == [2.0**-24, 1 - 2.0**-24]
    True
    """
    return ((words >> 9).to(dtype) + 0.5) * 2.0**-23


def normals(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals by Box-Muller, on words (0, 1) and (2, 3) of each block.

    r = sqrt(-2 ln u_a), angle = 2 pi u_b; a pair gives (r cos angle, r sin angle).

    words: [(..., 4), int64]
    dtype: float32 is the contract, float64 its exact value for the same words

    Returns normals [(..., 4), dtype].
    Source: Box and Muller 1958.
    """
    u = uniforms(words, dtype)
    radius = torch.sqrt(-2.0 * torch.log(u[..., 0::2]))
    angle = 2.0 * math.pi * u[..., 1::2]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(-2)


def standard_normals(
    query_id: Tensor,
    timestep: Tensor,
    sample: Tensor,
    elements: int,
    *,
    seed: int,
    antithetic: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The noise of R rows; element j of a row is word j % 4 of block j // 4.

    Antithetic: sample 2m+1 has the counter of sample 2m, and the normal is negated.

    query_id, timestep, sample, seed: see `noise_words`
    elements: elements of a row, in its logical contiguous order

    Returns normals [(R, elements), dtype].

    >>> row = torch.tensor([7])
    >>> long = standard_normals(row, row, row, 9, seed=1)
    >>> torch.equal(standard_normals(row, row, row, 5, seed=1), long[:, :5])
    True
    """
    rows = query_id.shape[0]
    counter_sample = sample & ~1 if antithetic else sample
    noise = torch.empty((rows, elements), dtype=dtype, device=query_id.device)
    step = max(1, TILE_ELEMENTS // (4 * max(rows, 1)))
    for block in range(0, -(-elements // 4), step):
        part = noise[:, 4 * block : 4 * (block + step)]
        blocks = -(-part.shape[1] // 4)
        words = noise_words(query_id, timestep, counter_sample, seed=seed, first_block=block, blocks=blocks)
        part.copy_(normals(words, dtype).flatten(1)[:, : part.shape[1]])
    if antithetic:
        noise *= (1 - 2 * (sample & 1))[:, None]
    return noise
