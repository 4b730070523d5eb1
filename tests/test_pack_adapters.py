"""Adapters in delta packs: factors stay factors, and the models are those of the adapter's own files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapter_cases import randomised, unet
from guda_fast import DeltaBank, build_pack

TARGETS = ["to_q", "to_v", "conv1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A PEFT adapter with two ranks, and one module saved whole."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=TARGETS, rank_pattern={"to_v": 1}, modules_to_save=["conv_out"])
        injected = get_peft_model(unet(), config)
    for part in ("lora_", "modules_to_save."):
        randomised(injected, seed=3, only=part)
    injected.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("rank", ["off", "auto"])
@pytest.mark.parametrize("dtype", ["float32", "stored"])
def test_adapters_keep_their_factors_bit_for_bit(folder: Path, tmp_path: Path, dtype: str, rank: str) -> None:
    base = unet()
    pack = build_pack(base, {"g": folder}, tmp_path / "bank", dtype=dtype, rank=rank, tolerance=0)
    bank, expected = DeltaBank.load(base, pack), DeltaBank.load(base, {"g": folder})
    assert bank.hash == expected.hash
    ranks = pack["g"].ranks
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in ranks} == {*TARGETS}
    assert {rank for name, rank in ranks.items() if "to_v" in name} == {1}
    assert pack["g"].survey.kind == "mixed" and pack["g"].survey.support["conv_out.weight"] == "dense"
    found, wanted = bank.apply("g").state_dict(), expected.apply("g").state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any(Path(source.path).name == "adapter_config.json" for source in pack["g"].sources)


def test_half_precision_adapters_take_their_own_size(folder: Path, tmp_path: Path) -> None:
    base = unet()
    pack = build_pack(base, {"g": folder}, tmp_path / "bank", dtype="float16")
    rounding = pack["g"].rounding
    # Of a product of two rounded factors, each by 2^-11 of itself at most.
    assert 0 < rounding.relative_error < 2**-10 + 2**-22
    wide = build_pack(base, {"g": folder}, tmp_path / "wide")
    values = pack["g"].survey.bytes // 4
    assert abs((tmp_path / "wide").stat().st_size - (tmp_path / "bank").stat().st_size - 2 * values) <= 256
    assert wide["g"].survey.kind == pack["g"].survey.kind
