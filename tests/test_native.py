"""The extension itself: the noise contract, equal bits everywhere, and its own argument checks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from guda_fast import _C
from native_calls import (
    Rows,
    add_noise,
    add_noise_arguments,
    box_muller,
    contract_words,
    denoising_error,
    denoising_error_arguments,
    instruction_set,
    native_words,
)

SETS = _C.instruction_sets()
SIZES = [1, 2, 3, 5, 15, 16, 17, 63, 64, 65, 105, 4095, 4096, 4097, 12289]

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


def unit_noise_rows(query_id: int = 5, timestep: int = 3) -> Rows:
    rows = Rows(1, 1)
    rows.query_id.fill_(query_id)
    rows.timestep.fill_(timestep)
    rows.sample.zero_()
    rows.x0_scale.zero_()
    rows.eps_scale.fill_(1.0)
    return rows


class TestAddNoise:
    @pytest.mark.parametrize("name", SETS)
    @pytest.mark.parametrize("elements", SIZES)
    @pytest.mark.parametrize("antithetic", [False, True])
    def test_definition(self, name: str, elements: int, antithetic: bool) -> None:
        x0, rows = torch.randn(3, elements), Rows(4, 3)
        with instruction_set(name):
            noised = add_noise(x0, rows, antithetic=antithetic)
        expected = plain_noised(x0, rows, antithetic=antithetic)
        assert float((noised.double() - expected).abs().max()) <= noised_tolerance(x0)

    @pytest.mark.parametrize("elements", SIZES)
    def test_equal_bits_for_every_set_and_thread_count(self, elements: int) -> None:
        x0, rows = torch.randn(3, elements), Rows(37, 3)
        results = []
        for name, threads in itertools.product(SETS, (1, 2, 3)):
            with instruction_set(name):
                results.append(add_noise(x0, rows, threads=threads))
        assert all(torch.equal(result, results[0]) for result in results)

    @pytest.mark.parametrize("name", SETS)
    @pytest.mark.parametrize("shape", [(7,), (3, 65), (3, 7, 5), (2, 3, 33, 31), (1, 1, 1, 1), (2, 1, 129, 2)])
    def test_strides(self, name: str, shape: tuple[int, ...]) -> None:
        """Permuted, sliced, stepped and expanded inputs and outputs give the contiguous call's bits."""
        rows = Rows(5, 4)
        x0 = torch.randn(4, *shape)
        with instruction_set(name):
            expected = add_noise(x0, rows)
            for x0_view in views_of(x0):
                for out in views_of(torch.empty_like(expected)):
                    assert torch.equal(add_noise(x0_view, rows, out=out), expected)
            shared = x0[:1].expand(4, *shape)
            assert torch.equal(add_noise(shared, rows), add_noise(shared.contiguous(), rows))

    def test_strided_output_leaves_the_rest_alone(self) -> None:
        storage = torch.zeros(6, 10, 10)
        add_noise(torch.randn(2, 5, 3), Rows(3, 2), out=storage[::2, ::2, 1:4])
        written = storage != 0
        assert written[::2, ::2, 1:4].all()
        assert int(written.sum()) == 3 * 5 * 3

    def test_rows_stand_alone(self) -> None:
        """A row's result does not depend on the other rows of the call."""
        x0, rows = torch.randn(3, 4, 9, 9), Rows(6, 3)
        together = add_noise(x0, rows)
        for row in range(6):
            alone = Rows(1, 3)
            for field in ("query_index", "query_id", "timestep", "sample", "x0_scale", "eps_scale"):
                setattr(alone, field, getattr(rows, field)[row : row + 1])
            assert torch.equal(add_noise(x0, alone)[0], together[row])

    @pytest.mark.parametrize("name", SETS)
    def test_antithetic_pairs_cancel(self, name: str) -> None:
        rows = Rows(2, 1)
        rows.x0_scale.zero_()
        rows.eps_scale.fill_(0.7)
        rows.query_id.fill_(9)
        rows.timestep.fill_(11)
        rows.sample[:] = torch.tensor([6, 7])
        with instruction_set(name):
            pair = add_noise(torch.zeros(1, 1001), rows, antithetic=True)
            plain = add_noise(torch.zeros(1, 1001), rows)
        assert torch.equal(pair[0], -pair[1])
        assert torch.equal(pair[0], plain[0])
        assert not torch.equal(plain[0], -plain[1])

    @pytest.mark.parametrize("name", SETS)
    @pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
    def test_scale_of_zero_ignores_x0(self, name: str, bad: float) -> None:
        rows = Rows(2, 1)
        rows.x0_scale[:] = torch.tensor([0.0, 0.5])
        with instruction_set(name):
            noised = add_noise(torch.full((1, 77), bad), rows)
        assert noised[0].isfinite().all()
        assert not noised[1].isfinite().any()

    @pytest.mark.parametrize(("rows", "shape"), [(0, (3, 4)), (5, (3, 0)), (5, (0, 3, 2)), (0, (0,))])
    def test_empty(self, rows: int, shape: tuple[int, ...]) -> None:
        assert add_noise(torch.zeros(2, *shape), Rows(rows, 2)).shape == (rows, *shape)

    def test_no_rows_needs_no_queries(self) -> None:
        assert add_noise(torch.zeros(0, 8), Rows(0, 0)).shape == (0, 8)

    def test_seed_of_64_bits(self) -> None:
        rows = unit_noise_rows()
        results = [add_noise(torch.zeros(1, 8), rows, seed=seed) for seed in (0, 2**32, 2**63, 2**64 - 1)]
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(results, 2))


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


class TestDenoisingError:
    @pytest.mark.parametrize("name", SETS)
    @pytest.mark.parametrize("elements", SIZES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_definition(self, name: str, elements: int, dtype: torch.dtype) -> None:
        x0, rows = torch.randn(2, elements), Rows(3, 2)
        predictions = torch.randn(3, 3, elements).to(dtype)
        with instruction_set(name):
            errors, paired = denoising_error(predictions, x0, rows, paired=True)
        assert paired is not None
        target = plain_noised(x0, rows)
        expected = rows.weight * (predictions.double() - target).square().sum(-1)
        change = predictions.double() - predictions[:1].double()
        together = predictions.double() + predictions[:1].double() - 2 * target
        expected_paired = rows.weight * (change * together).sum(-1)
        # A float32 difference is off by the target's error and one rounding of a value below 16.
        off = noised_tolerance(x0) + 2.0**-24 * 16
        slack = rows.weight * (2 * off * (predictions.double() - target).abs() + off**2).sum(-1)
        assert ((errors - expected).abs() <= slack + 1e-14 * expected).all()
        rounding = 2.0**-24 * change.abs() * together.abs()
        slack = rows.weight * (2 * off * change.abs() + rounding).sum(-1)
        assert ((paired - expected_paired).abs() <= slack + 1e-12).all()
        assert (paired[0] == 0).all()

    @pytest.mark.parametrize("elements", SIZES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_equal_bits_for_every_set_and_thread_count(self, elements: int, dtype: torch.dtype) -> None:
        x0, rows = torch.randn(3, elements), Rows(19, 3)
        predictions = torch.randn(2, 19, elements).to(dtype)
        results = []
        for name, threads in itertools.product(SETS, (1, 2, 3)):
            with instruction_set(name):
                results.append(denoising_error(predictions, x0, rows, paired=True, threads=threads))
        for errors, paired in results:
            assert torch.equal(errors, results[0][0])
            assert paired is not None
            assert results[0][1] is not None
            assert torch.equal(paired, results[0][1])

    @pytest.mark.parametrize("name", SETS)
    def test_paired_and_plain_errors_are_equal_bits(self, name: str) -> None:
        x0, rows, predictions = torch.randn(2, 4099), Rows(3, 2), torch.randn(3, 3, 4099)
        with instruction_set(name):
            assert torch.equal(
                denoising_error(predictions, x0, rows, paired=True)[0],
                denoising_error(predictions, x0, rows)[0],
            )

    @pytest.mark.parametrize("name", SETS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(7,), (6, 65), (3, 7, 5), (2, 3, 33, 31)])
    def test_strides(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        x0, rows = torch.randn(4, *shape), Rows(5, 4)
        predictions = torch.randn(2, 5, *shape).to(dtype)
        with instruction_set(name):
            expected = denoising_error(predictions, x0, rows, paired=True)
            flat = predictions.reshape(10, *shape)
            for view in views_of(flat.float()):
                strided = view.to(dtype).unflatten(0, (2, 5))
                assert_same(denoising_error(strided, x0, rows, paired=True), expected)
            wide = torch.full((2, 5, 2 * shape[0], *shape[1:]), torch.nan, dtype=dtype)[:, :, : shape[0]]
            assert_same(denoising_error(wide.copy_(predictions), x0, rows, paired=True), expected)
            models_inside = predictions.transpose(0, 1).contiguous().transpose(0, 1)
            assert_same(denoising_error(models_inside, x0, rows, paired=True), expected)

    def test_expanded_predictions(self) -> None:
        x0, rows, one = torch.randn(2, 4, 8, 8), Rows(3, 2), torch.randn(1, 1, 4, 1, 8)
        expanded = one.expand(2, 3, 4, 8, 8)
        assert_same(
            denoising_error(expanded, x0, rows, paired=True),
            denoising_error(expanded.contiguous(), x0, rows, paired=True),
        )

    @pytest.mark.parametrize("name", SETS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_every_16_bit_value_is_converted_exactly(self, name: str, dtype: torch.dtype) -> None:
        """One element a row against a target of zero: the error is the value's square."""
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        predictions = bits.view(dtype).reshape(1, -1, 1)
        rows = Rows(2**16, 1)
        rows.x0_scale.zero_()
        rows.eps_scale.zero_()
        rows.weight.fill_(1.0)
        with instruction_set(name):
            errors, _ = denoising_error(predictions, torch.zeros(1, 1), rows)
        expected = predictions.double().square().squeeze(-1)
        assert torch.equal(errors.isnan(), expected.isnan())
        assert torch.equal(errors.nan_to_num(-1.0), expected.nan_to_num(-1.0))

    @pytest.mark.parametrize("name", SETS)
    def test_subnormal_float16_survives_flush_denormal(self, name: str) -> None:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormal numbers")
        try:
            rows = Rows(1, 1)
            rows.x0_scale.zero_()
            rows.eps_scale.zero_()
            rows.weight.fill_(1.0)
            tiny = torch.tensor([1], dtype=torch.int16).view(torch.float16).reshape(1, 1, 1)
            with instruction_set(name):
                errors, _ = denoising_error(tiny, torch.zeros(1, 1), rows)
        finally:
            torch.set_flush_denormal(False)
        assert float(errors) == 2.0**-48

    def test_small_differences_survive(self) -> None:
        """A change of one part in 2**20 of the predictions: four digits of it are right."""
        x0, rows, base = torch.randn(1, 3072), Rows(2, 1), torch.randn(2, 3072)
        predictions = torch.stack([base, base * (1 + 2.0**-20)])
        _, paired = denoising_error(predictions, x0, rows, paired=True)
        assert paired is not None
        change = predictions[1].double() - predictions[0].double()
        together = predictions.double().sum(0) - 2 * plain_noised(x0, rows)
        expected = rows.weight * (change * together).sum(-1)
        # The sum is linear in the change, so a wrong target costs its error times the change and no more.
        off = noised_tolerance(x0) + 2.0**-24 * 16
        assert ((paired[1] - expected).abs() <= rows.weight * 2 * off * change.abs().sum(-1)).all()
        assert (rows.weight * 2 * off * change.abs().sum(-1) < 1e-4 * expected.abs()).all()

    @pytest.mark.parametrize(("models", "rows", "shape"), [(0, 3, (4,)), (2, 0, (4,)), (2, 3, (0, 4))])
    def test_empty(self, models: int, rows: int, shape: tuple[int, ...]) -> None:
        errors, paired = denoising_error(
            torch.zeros(models, rows, *shape), torch.zeros(2, *shape), Rows(rows, 2), paired=True
        )
        assert paired is not None
        assert torch.equal(errors, torch.zeros(models, rows, dtype=torch.float64))
        assert torch.equal(paired, torch.zeros(models, rows, dtype=torch.float64))


def assert_same(
    result: tuple[torch.Tensor, torch.Tensor | None], expected: tuple[torch.Tensor, torch.Tensor | None]
) -> None:
    assert torch.equal(result[0], expected[0])
    assert result[1] is not None
    assert expected[1] is not None
    assert torch.equal(result[1], expected[1])


SHARED_REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rows": -1}, ValueError, "rows must be at least 0, got -1"),
    ({"queries": -1}, ValueError, "queries must be at least 0, got -1"),
    ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
    ({"shape": []}, ValueError, "shape must have 1 to 4 dimensions, got 0"),
    ({"shape": [1, 1, 1, 1, 1]}, ValueError, "shape must have 1 to 4 dimensions, got 5"),
    ({"shape": [3, -1]}, ValueError, "shape must have no negative size, got -1"),
    ({"shape": [2**20, 2**20]}, ValueError, r"shape must have at most 2\*\*34 elements"),
    ({"x0_strides": [1, 1]}, ValueError, "x0_strides must have 3 entries, got 2"),
    ({"queries": 1}, IndexError, "query_index must be between 0 and 0, got 1 in row 1"),
    ({"queries": 0}, IndexError, "query_index must be between 0 and -1, got 0 in row 0"),
    ({"x0": 0}, ValueError, "x0 must not be a null pointer"),
    ({"query_index": 0}, ValueError, "query_index must not be a null pointer"),
    ({"query_id": 0}, ValueError, "query_id must not be a null pointer"),
    ({"timestep": 0}, ValueError, "timestep must not be a null pointer"),
    ({"sample": 0}, ValueError, "sample must not be a null pointer"),
    ({"x0_scale": 0}, ValueError, "x0_scale must not be a null pointer"),
    ({"eps_scale": 0}, ValueError, "eps_scale must not be a null pointer"),
    ({"seed": -1}, TypeError, "incompatible function arguments"),
    ({"seed": 2**64}, TypeError, "incompatible function arguments"),
]


def refusal_rows() -> Rows:
    rows = Rows(2, 2)
    rows.query_index[:] = torch.tensor([0, 1])
    return rows


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            *SHARED_REFUSALS,
            ({"out": 0}, ValueError, "out must not be a null pointer"),
            ({"out_strides": [12, 4, 1, 1]}, ValueError, "out_strides must have 3 entries, got 4"),
            ({"out_strides": [12, 0, 1]}, ValueError, "out_strides must not let elements overlap"),
            ({"out_strides": [0, 4, 1]}, ValueError, "out_strides must not let elements overlap"),
        ],
    )
    def test_add_noise(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        rows, x0, out = refusal_rows(), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
        prefix = "" if error is TypeError else "add_noise: "
        with pytest.raises(error, match=prefix + message):
            _C.add_noise(**{**add_noise_arguments(out, x0, rows), **change})
        assert (out == 0).all()

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            *SHARED_REFUSALS,
            ({"errors": 0}, ValueError, "errors must not be a null pointer"),
            ({"weight": 0}, ValueError, "weight must not be a null pointer"),
            ({"predictions": 0}, ValueError, "predictions must not be a null pointer"),
            ({"prediction_strides": [12, 4, 1]}, ValueError, "prediction_strides must have 4 entries, got 3"),
            ({"models": -1}, ValueError, "models must be at least 0, got -1"),
            (
                {"dtype": "float64"},
                ValueError,
                "dtype must be one of 'float32', 'bfloat16', 'float16', got 'float64'",
            ),
        ],
    )
    def test_denoising_error(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        rows, x0, predictions = refusal_rows(), torch.zeros(2, 3, 4), torch.zeros(1, 2, 3, 4)
        errors = torch.zeros(1, 2, dtype=torch.float64)
        prefix = "" if error is TypeError else "denoising_error: "
        with pytest.raises(error, match=prefix + message):
            _C.denoising_error(**{**denoising_error_arguments(errors, None, predictions, x0, rows), **change})
        assert (errors == 0).all()

    @pytest.mark.parametrize(
        ("field", "value", "error"),
        [
            ("query_index", -1, IndexError),
            ("query_index", 2, IndexError),
            ("timestep", -1, ValueError),
            ("timestep", 65536, ValueError),
            ("sample", -1, ValueError),
            ("sample", 2**40, ValueError),
        ],
    )
    def test_rows_are_named(self, field: str, value: int, error: type[Exception]) -> None:
        rows, out = refusal_rows(), torch.zeros(2, 5)
        getattr(rows, field)[1] = value
        with pytest.raises(error, match=f"add_noise: {field} must be .*, got {value} in row 1"):
            _C.add_noise(**add_noise_arguments(out, torch.zeros(2, 5), rows))

    def test_instruction_set(self) -> None:
        with pytest.raises(ValueError, match=r"name must be one of 'baseline'.*, got 'sse9'"):
            _C.set_instruction_set("sse9")

    def test_instruction_sets_in_order(self) -> None:
        assert [name for name in ("baseline", "avx2", "avx512") if name in SETS] == SETS
        assert _C.instruction_set() == SETS[-1]
