"""The extension itself: the noise contract in every instruction set, and which sets there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guda_fast import _C
from native_calls import add_noise, box_muller, contract_words, instruction_set, native_words
from native_rows import SETS, plain_noise, unit_noise_rows

# (block, seed) of query 0, timestep 0, sample 0, found by a search: u_a = 2**-24 and 1 - 2**-24, next to the
# fold of the logarithm at sqrt(1/2), next to 1/2; then the turn u_b next to 0, 1/4, 1/2, 3/4, 1, and next to
# 1/8 and 5/8, where the quadrant changes. test_extreme_blocks_are_extreme holds the list to that.
EXTREME_BLOCKS = [
    (482, 16754),
    (94, 4696),
    (435, 3025),
    (308, 86),
    (790, 2229),
    (952, 2678),
    (1020, 482),
    (904, 255),
    (733, 707),
    (446, 1407),
    (353, 411),
]


class TestWords:
    @pytest.mark.parametrize("name", SETS)
    def test_known_answers(self, name: str) -> None:
        """Random123's published vectors, as far as the layout of key and counter can express them."""
        with instruction_set(name):
            zero = native_words(range(1))
            ones = native_words(range(2**32 - 1, 2**32), -1, 0xFFFF, 0xFFFF, 2**64 - 1)
            digits = native_words(
                range(0x243F6A88, 0x243F6A89),
                0x13198A2E | 0x03707344 << 32,
                0x85A308D3 & 0xFFFF,
                0x85A308D3 >> 16,
                0xA4093822 | 0x299F31D0 << 32,
            )
        assert [f"{word:08x}" for word in zero] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
        assert [f"{word:08x}" for word in ones] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
        assert [f"{word:08x}" for word in digits] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]

    @pytest.mark.parametrize("name", SETS)
    @pytest.mark.parametrize("blocks", [range(1), range(3, 40), range(1021, 1300), range(2**32 - 9, 2**32)])
    @pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 + 12345, 2**64 - 1])
    def test_equal_plain_philox(self, name: str, blocks: range, seed: int) -> None:
        arguments = (-6_789_012_345_678_901_234, 999, 65535, seed)
        with instruction_set(name):
            np.testing.assert_array_equal(native_words(blocks, *arguments), contract_words(blocks, *arguments))

    @pytest.mark.parametrize("name", SETS)
    def test_writes_no_further(self, name: str) -> None:
        with instruction_set(name):
            for blocks in range(1, 40):
                out = np.full(4 * blocks + 4, 0xABCDABCD, dtype=np.uint32)
                _C.noise_words(out.ctypes.data, blocks, 0, 1, 2, 3, 4)
                assert (out[4 * blocks :] == 0xABCDABCD).all()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"blocks": -1}, "noise_words: blocks must be at least 0, got -1"),
            ({"first_block": -1}, "noise_words: first_block must be between 0 and 2"),
            ({"first_block": 2**32}, "noise_words: first_block must be between 0 and 2"),
            ({"timestep": 65536}, "noise_words: timestep must be between 0 and 65535, got 65536"),
            ({"sample": -1}, "noise_words: sample must be between 0 and 65535, got -1"),
            ({"out": 0}, "noise_words: out must not be a null pointer"),
        ],
    )
    def test_refuses(self, change: dict[str, int], message: str) -> None:
        out = np.zeros(8, dtype=np.uint32)
        arguments = {"blocks": 2, "first_block": 0, "query_id": 0, "timestep": 0, "sample": 0, "seed": 0}
        with pytest.raises(ValueError, match=message):
            _C.noise_words(**{"out": out.ctypes.data, **arguments, **change})


class TestNormals:
    @pytest.mark.parametrize("name", SETS)
    def test_known_answers(self, name: str) -> None:
        """Those of kernels/NOISE.md, printed with six decimals."""
        rows = unit_noise_rows(query_id=0x0370734413198A2E, timestep=990)
        rows.sample.fill_(1)
        with instruction_set(name):
            eps = add_noise(torch.zeros(1, 8), rows, seed=42)[0]
        known = [-0.845441, -0.862052, 1.259155, -0.456030, 0.683615, -0.659746, -1.468134, 1.068855]
        np.testing.assert_allclose(eps.double().numpy(), known, rtol=0, atol=4e-6 + 5e-7)

    @pytest.mark.parametrize("name", SETS)
    def test_a_million_within_the_contract(self, name: str) -> None:
        rows = unit_noise_rows()
        with instruction_set(name):
            eps = add_noise(torch.zeros(1, 1_000_003), rows)
        assert float((eps.double() - plain_noise(rows, 1_000_003, 7)).abs().max()) <= 4e-6

    @pytest.mark.parametrize("name", SETS)
    def test_extremes(self, name: str) -> None:
        rows = unit_noise_rows(query_id=0, timestep=0)
        with instruction_set(name):
            for block, seed in EXTREME_BLOCKS:
                words = native_words(range(block, block + 1), seed=seed)
                eps = add_noise(torch.zeros(1, 4 * block + 4), rows, seed=seed)[0, 4 * block :]
                np.testing.assert_allclose(eps.double().numpy(), box_muller(words), rtol=0, atol=4e-6)

    def test_extreme_blocks_are_extreme(self) -> None:
        words = np.stack([native_words(range(block, block + 1), seed=seed) for block, seed in EXTREME_BLOCKS])
        uniforms = ((words >> 9) + 0.5) * 2.0**-23
        radii, turns = uniforms[:, 0::2], uniforms[:, 1::2]
        assert radii.min() == 2.0**-24
        assert radii.max() == 1.0 - 2.0**-24
        for near in (0.5, 0.5**0.5):
            assert np.abs(radii - near).min() <= 2.0**-24
        for near in (0.0, 0.125, 0.25, 0.5, 0.625, 0.75, 1.0):
            assert np.abs(turns - near).min() == 2.0**-24


def test_instruction_set() -> None:
    with pytest.raises(ValueError, match=r"name must be one of 'baseline'.*, got 'sse9'"):
        _C.set_instruction_set("sse9")


def test_instruction_sets_in_order() -> None:
    assert [name for name in ("baseline", "avx2", "avx512") if name in SETS] == SETS
    assert _C.instruction_set() == SETS[-1]
