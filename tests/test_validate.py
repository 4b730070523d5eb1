"""Argument checks: what passes, and the exact complaint where it does not."""

from __future__ import annotations

import math

import pytest
import torch

from guda_fast import _validate as validate


def test_check_tensor_returns_what_passes() -> None:
    tensor = torch.zeros(2, 3)
    assert validate.check_tensor("f", "x", tensor, shape=(None, 3), dtypes=(torch.float32,)) is tensor
    assert validate.check_tensor("f", "x", tensor, min_dim=2, max_dim=2, device=tensor.device) is tensor


@pytest.mark.parametrize(
    ("value", "rules", "error", "message"),
    [
        ([1.0], {}, TypeError, r"f: x must be a torch.Tensor, got \[1.0\] \(list\)"),
        (
            torch.zeros(2).to_sparse(),
            {},
            TypeError,
            r"f: x must be a dense tensor, got one of layout torch.spars",
        ),
        (
            torch.zeros(2),
            {"min_dim": 2},
            ValueError,
            r"f: x must have at least 2 dimensions, got float32 tensor of",
        ),
        (torch.zeros(1, 1), {"max_dim": 1}, ValueError, r"f: x must have at most 1 dimensions, got float32"),
        (
            torch.zeros(2),
            {"shape": (None, 3)},
            ValueError,
            r"f: x must have shape \(\*, 3\), got .*shape \(2,\)",
        ),
        (torch.zeros(2), {"dtypes": (torch.int64,)}, TypeError, r"f: x must be int64, got float32 tensor"),
        (
            torch.zeros(2),
            {"device": torch.device("meta")},
            ValueError,
            r"f: x must be on meta, got .* on cpu",
        ),
    ],
)
def test_check_tensor_complains(value: object, rules: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        validate.check_tensor("f", "x", value, **rules)


def test_shape_is_judged_before_dtype_and_dtype_before_device() -> None:
    rules = {"dtypes": (torch.int64,), "device": torch.device("meta")}
    with pytest.raises(ValueError, match="must have shape"):
        validate.check_tensor("f", "x", torch.zeros(2), shape=(3,), **rules)
    with pytest.raises(TypeError, match="must be int64"):
        validate.check_tensor("f", "x", torch.zeros(2), shape=(2,), **rules)


def test_check_index_range() -> None:
    validate.check_index_range("f", "i", torch.tensor([0, 4]), 4)
    validate.check_index_range("f", "i", torch.tensor([], dtype=torch.int64), -1)
    with pytest.raises(ValueError, match=r"f: i must be in \[0, 5\), got 5 at row 1"):
        validate.check_index_range("f", "i", torch.tensor([0, 5, -1]), 4)
    with pytest.raises(ValueError, match=r"f: i must be in \[0, 5\), got -3 at row 2"):
        validate.check_index_range("f", "i", torch.tensor([0, 1, -3]), 4)


def test_check_output_accepts_what_does_not_overlap() -> None:
    storage = torch.zeros(100)
    like = storage[:24]
    for out in (
        torch.zeros(4, 6),
        torch.zeros(6, 4).T,
        torch.zeros(8, 12)[::2, ::2],
        storage[24:48].view(4, 6),
        torch.zeros(1).expand(4, 6)[:0],
    ):
        assert validate.check_output("f", "out", out, shape=out.shape, inputs={"x0": like}) is out


@pytest.mark.parametrize("strides", [(0, 1), (1, 0), (5, 1), (1, 1), (2, 3)])
def test_check_output_refuses_overlap_with_itself(strides: tuple[int, int]) -> None:
    out = torch.zeros(100).as_strided((4, 6), strides)
    with pytest.raises(ValueError, match=r"f: out must not overlap itself, got strides"):
        validate.check_output("f", "out", out, shape=(4, 6), inputs={"x0": torch.zeros(1)})


def test_check_output_refuses_the_inputs_memory_shape_dtype() -> None:
    storage = torch.zeros(100)
    with pytest.raises(ValueError, match=r"f: out must not share memory with x0"):
        validate.check_output("f", "out", storage[23:47], shape=(24,), inputs={"x0": storage[:24]})
    with pytest.raises(ValueError, match=r"f: out must not share memory with scale"):
        inputs = {"x0": torch.zeros(1), "scale": storage[46:48]}
        validate.check_output("f", "out", storage[23:47], shape=(24,), inputs=inputs)
    with pytest.raises(ValueError, match=r"f: out must have shape \(3,\)"):
        validate.check_output("f", "out", storage, shape=(3,), inputs={"x0": torch.zeros(1)})
    with pytest.raises(TypeError, match=r"f: out must be float32, got float64"):
        validate.check_output("f", "out", torch.zeros(3).double(), shape=(3,), inputs={"x0": storage})


def test_check_int() -> None:
    assert validate.check_int("f", "n", 3, 0) == 3
    assert validate.check_int("f", "n", torch.tensor(3).numpy()[()], 0, 3) == 3
    for value in (True, 1.0, "1", None):
        with pytest.raises(TypeError, match="f: n must be an integer, got"):
            validate.check_int("f", "n", value, 0)
    with pytest.raises(ValueError, match="f: n must be at least 1, got 0"):
        validate.check_int("f", "n", 0, 1)
    with pytest.raises(ValueError, match="f: n must be between 1 and 4, got 5"):
        validate.check_int("f", "n", 5, 1, 4)


def test_check_real() -> None:
    assert validate.check_real("f", "x", 2, 0) == 2.0
    for value in (True, "1", None, 1j):
        with pytest.raises(TypeError, match="f: x must be a real number, got"):
            validate.check_real("f", "x", value, 0)
    for value in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="f: x must be finite and at least 0, got"):
            validate.check_real("f", "x", value, 0)
    with pytest.raises(ValueError, match=r"f: x must be between 0 and 1, got 1\.5"):
        validate.check_real("f", "x", 1.5, 0, 1)


def test_check_bool_and_choice() -> None:
    assert validate.check_bool("f", "b", False) is False
    for value in (0, 1, None, "yes"):
        with pytest.raises(TypeError, match="f: b must be a bool, got"):
            validate.check_bool("f", "b", value)
    assert validate.check_choice("f", "c", "a", ("a", "b")) == "a"
    for value in ("z", None, 3):
        with pytest.raises(ValueError, match="f: c must be one of 'a', 'b', got"):
            validate.check_choice("f", "c", value, ("a", "b"))


def test_long_values_are_shortened() -> None:
    assert validate.describe("x" * 200).endswith("...")
    assert len(validate.describe("x" * 200)) == 80
