"""Deltas that are given as such, with dense and low-rank parts."""

from __future__ import annotations

import pytest
import torch

from guda_fast.deltas import Delta, DeltaBank, Dense, LowRank
from guda_fast.errors import CheckpointError


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.linear = torch.nn.Linear(4, 5, bias=False)
        self.tied = torch.nn.Linear(4, 5)
        self.tied.weight = self.linear.weight
        self.register_buffer("count", torch.tensor(0))


@pytest.fixture
def base() -> Net:
    torch.manual_seed(0)
    return Net()


def factors(rank: int = 2) -> LowRank:
    return LowRank(torch.randn(4, rank), torch.randn(rank, 3, 3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_low_rank_part_is_merged_in_float32_and_rounded_once(base: Net, dtype: torch.dtype) -> None:
    part, bias = factors(), Dense(torch.randn(4))
    bank = DeltaBank.load(base, {"a": Delta({"conv.weight": part, "conv.bias": bias})}).to(dtype=dtype)
    before = {name: value.clone() for name, value in bank.model.state_dict().items()}
    wide = torch.promote_types(dtype, torch.float32)
    weight = base.conv.weight.detach().to(wide) + (part.up.to(wide) @ part.down.to(wide).flatten(1)).view(4, 3, 3, 3)
    with bank.applied("a") as model:
        state = model.state_dict()
        torch.testing.assert_close(state["conv.weight"], weight.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(state["conv.bias"], (base.conv.bias.detach().to(wide) + bias.value.to(wide)).to(dtype))
    for name, value in bank.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_delta_that_was_given_is_copied(base: Net) -> None:
    part = factors()
    bank = DeltaBank.load(base, {"a": Delta({"conv.weight": part})})
    digest = bank.delta_hashes["a"]
    part.up.zero_()
    with bank.applied("a") as model:
        assert not torch.equal(model.conv.weight, base.conv.weight)
    assert DeltaBank.load(base, {"a": Delta({"conv.weight": factors(3)})}).delta_hashes["a"] != digest


def test_a_tied_tensor_is_found_under_each_name_and_taken_once(base: Net) -> None:
    part = Dense(torch.ones(5, 4))
    bank = DeltaBank.load(base, {"a": Delta({"tied.weight": part})})
    assert list(bank.deltas[0].parts) == ["linear.weight"]
    with pytest.raises(CheckpointError, match="key 'tied.weight' must not be given twice"):
        DeltaBank.load(base, {"a": Delta({"linear.weight": part, "tied.weight": part})})


def test_parts_of_zeros_are_none(base: Net) -> None:
    zeros = Delta(
        {"conv.weight": LowRank(torch.zeros(4, 1), torch.ones(1, 3, 3, 3)), "conv.bias": Dense(torch.zeros(4))}
    )
    with pytest.raises(CheckpointError, match=r"counterfactuals\['a'\]: equals the base"):
        DeltaBank.load(base, {"a": zeros})
    assert not DeltaBank.load(base, {"a": zeros}, allow_identical=True).deltas[0].parts


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("cnov.weight", factors(), "key 'cnov.weight' is not in the base"),
        ("count", Dense(torch.ones(())), "key 'count' must have no delta, because the base holds integers"),
        ("conv.bias", Dense(torch.ones(5)), r"must have shape \(4,\) as in the base, found \(5,\)"),
        ("conv.bias", LowRank(torch.ones(4, 1), torch.ones(1)), r"must have up \(O, r\) and down"),
        ("conv.weight", LowRank(torch.ones(4, 2), torch.ones(1, 3, 3, 3)), r"must have up \(O, r\) and down"),
        (
            "conv.weight",
            LowRank(torch.ones(4, 1), torch.ones(1, 3, 3, 3).double()),
            "one dtype, found float32 or float64",
        ),
        (
            "conv.bias",
            Dense(torch.ones(4).half()),
            "must have a float32 or float64 tensor as dense, found torch.float16",
        ),
        ("conv.bias", Dense(torch.tensor([1.0, 2.0, torch.nan, 4.0])), r"must be finite, found 1 NaN or infinite of 4"),
        ("conv.bias", torch.ones(4), "must be a Dense or a LowRank part, found Tensor"),
    ],
)
def test_parts_that_do_not_fit_are_refused(base: Net, name: str, part: Dense, message: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"counterfactuals\['a'\]: " + ("" if "not in" in message else ".*") + message
    ):
        DeltaBank.load(base, {"a": Delta({name: part})})
