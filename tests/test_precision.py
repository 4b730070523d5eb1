"""Precision policies: what they switch, what rounding keeps of deltas, and the audit that decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

import guda_fast as gf
from guda_fast.audit import PrecisionAudit, _rank_agreement
from guda_fast.deltas import Delta, Dense, LowRank
from guda_fast.forward import POLICIES, fastest_first, policy
from tiny import perturbed, tiny_unet

PROTOCOL = gf.Protocol.from_scheduler(DDPMScheduler(num_train_timesteps=100), start=5, stride=10)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return perturbed(tiny_unet(), 0.05, seed=9)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand((9, 1, 8, 8), generator=torch.Generator().manual_seed(0)) * 2 - 1


def scaled(base: nn.Module, factor: float, seed: int) -> Delta:
    """A dense delta of the given size relative to each weight."""
    generator = torch.Generator().manual_seed(seed)
    return Delta(
        {n: Dense(factor * p.detach() * torch.randn(p.shape, generator=generator)) for n, p in base.named_parameters()}
    )


def bank_of(base: nn.Module, factor: float) -> gf.DeltaBank:
    return gf.DeltaBank.load(base, {f"g{seed}": scaled(base, factor, seed) for seed in range(3)})


def test_a_large_delta_runs_in_bf16(base, images) -> None:
    bank = bank_of(base, 0.3)
    wide = gf.attribute(images, bank, PROTOCOL)
    narrow = gf.attribute(images, bank, PROTOCOL, precision="bf16")
    error = np.linalg.norm(narrow.scores - wide.scores) / np.linalg.norm(wide.scores)
    assert 0 < error < 0.05  # it did run in bfloat16, and well
    assert narrow.provenance["precision"] == "bf16" and narrow.provenance["precision_audit"]["passed"]
    assert wide.provenance["precision_audit"] is None
    assert all(0.99 < cosine < 1 for cosine in narrow.provenance["rounding_cosine"].values())


def test_a_small_delta_is_refused_in_bf16_with_figures_and_ways_out(base, images) -> None:
    bank = bank_of(base, 3e-4)
    with pytest.raises(gf.PrecisionError, match="precision must give the scores of fp32, got 'bf16'") as caught:
        gf.attribute(images, bank, PROTOCOL, precision="bf16")
    message = str(caught.value)
    assert "(group 'g" in message and "8 queries at 8 draws have a relative error of" in message
    assert "use precision='fp32', or pass allow_lossy=True" in message
    result = gf.attribute(images, bank, PROTOCOL, precision="bf16", allow_lossy=True)
    assert result.provenance["precision_audit"]["passed"] is False
    assert min(result.provenance["rounding_cosine"].values()) < 0.9


def test_auto_takes_bf16_only_where_the_audit_passes(base, images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guda_fast.forward.precision._cpu_has_bfloat16", lambda: True)
    result = gf.attribute(images, bank_of(base, 0.3), PROTOCOL, precision="auto")
    assert result.provenance["precision"] == "bf16" and result.provenance["precision_audit"]["passed"]
    result = gf.attribute(images, bank_of(base, 3e-4), PROTOCOL, precision="auto")
    assert result.provenance["precision"] == "fp32" and result.provenance["precision_audit"] is None
    monkeypatch.setattr("guda_fast.forward.precision._cpu_has_bfloat16", lambda: False)
    assert [p.name for p in fastest_first(CPU)] == ["fp32"]


def test_what_merging_erases_is_offered_unmerged(base, images) -> None:
    generator = torch.Generator().manual_seed(3)
    parts = {}
    for name, value in base.named_parameters():
        if value.dim() > 1:
            up = 1e-3 * value.detach().std() * torch.randn(len(value), 2, generator=generator)
            parts[name] = LowRank(up, torch.randn((2, *value.shape[1:]), generator=generator))
    with pytest.raises(gf.PrecisionError, match="try plan='batched', which does not merge low-rank deltas, or pass"):
        gf.attribute(images, gf.DeltaBank.load(base, {"a": Delta(parts)}), PROTOCOL, precision="bf16")


def test_the_audit_says_what_it_found(base, images) -> None:
    audit = gf.precision_audit(bank_of(base, 0.3), images, PROTOCOL, precision="bf16")
    assert (audit.queries, audit.draws, audit.precision) == (8, 8, "bf16")
    assert audit.passed and 0 < audit.relative_error < 0.05
    assert "8 queries at 8 draws have a relative error of" in str(audit)
    weights = replace(PROTOCOL, weighting=tuple(float(t) for t in PROTOCOL.timesteps))
    again = gf.precision_audit(bank_of(base, 0.3), images[:2], weights, precision="fp32")
    assert again.relative_error == 0 and again.rank_agreement == 1 and again.queries == 2
    with pytest.raises(ValueError, match="precision must be one of"):
        gf.precision_audit(bank_of(base, 0.3), images, PROTOCOL, precision="half")
    with pytest.raises(TypeError, match="bank must be a DeltaBank"):
        gf.precision_audit(images, bank_of(base, 0.3), PROTOCOL, precision="bf16")  # type: ignore[arg-type]


def test_both_limits_must_hold() -> None:
    good = PrecisionAudit("bf16", 8, 16, relative_error=0.05, rank_agreement=0.95)
    assert good.passed
    assert not replace(good, relative_error=0.051).passed and not replace(good, rank_agreement=0.949).passed


def test_rank_agreement_counts_pairs() -> None:
    expected = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    assert _rank_agreement(expected, 2 * expected) == 1
    assert _rank_agreement(expected, np.array([[2.0, 1.0, 3.0], [3.0, 2.0, 1.0]])) == pytest.approx(5 / 6)
    assert _rank_agreement(expected[:, :1], expected[:, :1]) == 1


@pytest.mark.parametrize("name", ["tf32", "fp16"])
def test_what_a_cpu_does_not_have_is_refused(base, images, name: str) -> None:
    with pytest.raises(ValueError, match=f"precision must be fp32, bf16 or fp64 on a CPU, got '{name}'"):
        gf.attribute(images, bank_of(base, 0.3), PROTOCOL, precision=name, device="cpu")
    assert policy("attribute", name, torch.device("cuda")) is POLICIES[name]


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("name", ["fp32", "tf32"])
def test_switches_are_set_and_set_back(name: str, new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Switch:
        def __init__(self) -> None:
            if new:
                self.fp32_precision: Any = "none"
            else:
                self.allow_tf32 = True

    class Cudnn(Switch):
        """Before torch 2.9 it had a switch for everything; now it has one for convolutions."""

    matmul, cudnn = Switch(), Cudnn()
    conv = cudnn
    if new:
        conv = cudnn.conv = Switch()  # type: ignore[attr-defined, assignment]
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    before = dict(vars(matmul))
    with pytest.raises(KeyError), POLICIES[name].active(torch.device("cuda")):
        expected: Any = ("tf32" if name == "tf32" else "ieee") if new else name == "tf32"
        assert list(vars(matmul).values()) == list(vars(conv).values()) == [expected]
        raise KeyError
    assert vars(matmul) == vars(conv) == before
    with POLICIES[name].active(CPU):
        assert vars(matmul) == before
