"""What a survey finds in a delta, against formulas over whole tensors in float64."""

from __future__ import annotations

import pytest
import torch

from guda_fast.deltas import Delta, DeltaBank, Dense, LowRank

PRECISIONS = ["float16", "bfloat16", "tf32"]


class Weight(torch.nn.Module):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(value)
        self.bias = torch.nn.Parameter(torch.zeros(3))


def surveyed(weight: torch.Tensor, delta: torch.Tensor | LowRank) -> dict[str, float]:
    part = delta if isinstance(delta, LowRank) else Dense(delta)
    return dict(DeltaBank.load(Weight(weight), {"g": Delta({"weight": part})}).survey("g").cosine)


@pytest.mark.parametrize(
    ("ratio", "cosines"),
    [(1e-2, (1.00, 0.97, 1.00)), (3e-3, (0.995, 0.81, 0.995)), (1e-3, (0.96, 0.52, 0.96))],
)
def test_rounding_cosines_of_normal_weights(ratio: float, cosines: tuple[float, ...]) -> None:
    """The values that were measured before this was written, to the digits that were noted."""
    torch.manual_seed(0)
    weight = torch.randn(1000, 1000)
    found = surveyed(weight, ratio * torch.randn(1000, 1000))
    for name, expected in zip(PRECISIONS, cosines, strict=True):
        assert found[name] == pytest.approx(expected, abs=0.0005 if expected == 0.995 else 0.005), name


def rounded(value: torch.Tensor, precision: str) -> torch.Tensor:
    if precision != "tf32":
        return value.float().to(getattr(torch, precision)).double()
    mantissa, exponent = torch.frexp(value.float())
    return torch.ldexp((mantissa.double() * 2**11).round() / 2**11, exponent)  # the first of 11 bits is implicit


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_survey_of_dense_and_low_rank_parts(memory_format: torch.memory_format) -> None:
    """Tensors above the length of a chunk and below, of which two do not fit into one."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(
        torch.nn.Conv2d(96, 96, 3),
        torch.nn.Linear(300, 500),
        torch.nn.LayerNorm(7),
        torch.nn.Linear(200, 250),
        torch.nn.Linear(250, 200),
    )
    parts = {
        "0.weight": Dense(1e-3 * torch.randn(96, 96, 3, 3)),
        "0.bias": Dense(1e-3 * torch.randn(96)),
        "1.weight": LowRank(0.03 * torch.randn(500, 2), 0.03 * torch.randn(2, 300)),
        "2.bias": Dense(1e-3 * torch.randn(7)),
        "3.weight": Dense(1e-3 * torch.randn(250, 200)),
        "4.weight": Dense(1e-3 * torch.randn(200, 250)),
    }
    delta = Delta(parts)
    bank = DeltaBank.load(base, {"g": delta}).to(memory_format=memory_format)
    found = bank.survey("g")
    assert found.support == {name: "low-rank" if name == "1.weight" else "dense" for name in parts}
    assert (found.hash, found.bytes) == (delta.hash, delta.bytes)
    theta = torch.cat([base.state_dict()[name].flatten() for name in parts])
    true = torch.cat([part.full(base.state_dict()[name].shape).flatten() for name, part in parts.items()])
    assert found.values == len(theta)
    assert found.relative_rms == pytest.approx(float(true.double().norm() / theta.double().norm()), rel=1e-9)
    for precision in PRECISIONS:
        left = rounded(theta + true, precision) - rounded(theta, precision)
        assert found.cosine[precision] == pytest.approx(cosine(left, true.double()), abs=1e-9), precision


def test_double_weights() -> None:
    torch.manual_seed(0)
    weight, change = torch.randn(50, 50).double(), 1e-3 * torch.randn(50, 50).double()
    found = surveyed(weight, change)
    left = rounded(weight + change, "tf32") - rounded(weight, "tf32")
    assert found["tf32"] == pytest.approx(cosine(left.flatten(), change.flatten()), abs=1e-9)


def test_cosines_where_rounding_leaves_nothing_or_overflows() -> None:
    lost = surveyed(torch.ones(4), torch.full((4,), 2.0**-20))
    assert lost == dict.fromkeys(PRECISIONS, 0.0)
    too_large = surveyed(torch.tensor([60000.0]), torch.tensor([20000.0]))
    assert too_large["float16"] == 0.0 and too_large["bfloat16"] == pytest.approx(1.0)


def test_the_extremes_of_relative_rms() -> None:
    bank = DeltaBank.load(Weight(torch.ones(2)), {"same": Delta({})}, allow_identical=True)
    same = bank.survey("same")
    assert (same.relative_rms, same.values, same.bytes, same.support) == (0.0, 0, 0, {})
    assert dict(same.cosine) == dict.fromkeys(PRECISIONS, 1.0)
    zero = DeltaBank.load(Weight(torch.zeros(2)), {"g": Delta({"weight": Dense(torch.ones(2))})}).survey("g")
    assert zero.relative_rms == float("inf") and zero.cosine["bfloat16"] == 1.0
