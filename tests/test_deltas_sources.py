"""What may be passed as a counterfactual: how it is recognised, and the choices of a Source."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import guda_fast
from guda_fast.deltas import Delta, DeltaBank, Dense, Source
from guda_fast.errors import CheckpointError
from tiny import perturbed, tiny_unet

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return tiny_unet()


@pytest.fixture(scope="module")
def other(base: torch.nn.Module) -> torch.nn.Module:
    return perturbed(base)


@pytest.fixture
def lora_file(base: torch.nn.Module, tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    name = next(name for name in base.state_dict() if name.endswith("to_q.weight")).removesuffix(".weight")
    size = base.state_dict()[f"{name}.weight"].shape[0]
    factors = {
        f"unet.{name}.lora_A.weight": torch.randn(2, size, generator=generator),
        f"unet.{name}.lora_B.weight": torch.randn(size, 2, generator=generator),
    }
    (tmp_path / "lora").mkdir()
    safetensors.torch.save_file(factors, path := tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    return path


def test_source_is_public() -> None:
    assert guda_fast.Source is Source


def test_callables_are_called_when_the_bank_is_loaded(
    base: torch.nn.Module, other: torch.nn.Module, tmp_path: Path
) -> None:
    other.save_pretrained(tmp_path)
    calls: list[str] = []

    def giving(name: str, what: object) -> Callable[[], Any]:
        return lambda: (calls.append(name), what)[1]

    delta = Delta({"conv_in.bias": Dense(torch.ones(8))})
    bank = DeltaBank.load(
        base,
        {
            "module": giving("module", other),
            "state": giving("state", other.state_dict()),
            "path": giving("path", tmp_path),
            "source": Source(giving("source", str(tmp_path)), format="diffusers"),
            "delta": giving("delta", delta),
        },
    )
    assert calls == ["module", "state", "path", "source", "delta"]
    hashes = bank.delta_hashes
    assert hashes.pop("delta") == DeltaBank.load(base, {"g": delta}).delta_hashes["g"]
    assert len(set(hashes.values())) == 1
    bank.apply("path")
    assert len(calls) == 5


def test_callables_must_give_something_that_opens(base: torch.nn.Module) -> None:
    with pytest.raises(
        TypeError, match=r"counterfactuals\['g'\] must give a path, .* a Delta or a Pack, got 3 \(int\)"
    ):
        DeltaBank.load(base, {"g": lambda: 3})  # type: ignore[dict-item, return-value]
    with pytest.raises(CheckpointError, match="^nowhere: no such file or folder"):
        DeltaBank.load(base, {"g": lambda: "nowhere"})
    with pytest.raises(ZeroDivisionError):
        DeltaBank.load(base, {"g": lambda: 1 // 0})  # type: ignore[dict-item, return-value]


def test_a_base_that_is_callable_is_a_module(base: torch.nn.Module, other: torch.nn.Module) -> None:
    """Modules and state dicts may have a __call__ of their own, which is not a request."""
    assert DeltaBank.load(base, {"g": Source(other)}).delta_hashes == DeltaBank.load(base, {"g": other}).delta_hashes


def test_arguments_are_checked() -> None:
    for call, error, message in [
        (lambda: Source(3), TypeError, r"Source: what must be a path, .* got 3 \(int\)"),
        (lambda: Source("x", format="zip"), ValueError, "Source: format must be one of 'diffusers', .* got 'zip'"),
        (
            lambda: Source("x", weights="average"),
            ValueError,
            "Source: weights must be one of 'raw', 'ema', got 'average'",
        ),
        (lambda: Source("x", scale="1"), TypeError, "Source: scale must be a real number, got '1'"),
        (
            lambda: Source("x", scale=float("inf")),
            ValueError,
            r"Source: scale must be between -1e\+06 and 1e\+06, got inf",
        ),
        (lambda: Source("x", variant=16), TypeError, r"Source: variant must be a string or None, got 16 \(int\)"),
        (lambda: Source("x", "diffusers"), TypeError, "positional argument"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_a_missing_source_is_found_before_any_work(base: torch.nn.Module, tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(b"not read")
    with pytest.raises(CheckpointError, match="missing.pt: no such file"):
        DeltaBank.load(base, {"a": tmp_path / "bad.pt", "b": Source(tmp_path / "missing.pt")})


def test_variants(base: torch.nn.Module, other: torch.nn.Module, tmp_path: Path) -> None:
    third = perturbed(base, seed=5)
    other.save_pretrained(tmp_path / "unet")
    third.save_pretrained(tmp_path / "unet", variant="non_ema", max_shard_size="20KB")
    sources = {"plain": tmp_path, "variant": Source(tmp_path, variant="non_ema")}
    bank = DeltaBank.load(base, {**sources, "other": other, "third": third})
    hashes = bank.delta_hashes
    assert hashes["plain"] == hashes["other"] != hashes["variant"] == hashes["third"]
    for variant in ("fp16", "../unet", ""):
        with pytest.raises(
            CheckpointError, match=f"^{tmp_path}/unet: must have the variant '{variant}', found non_ema$"
        ):
            DeltaBank.load(base, {"g": Source(tmp_path, variant=variant)})


def test_a_lora_in_a_folder_or_a_file_and_its_scale(base: torch.nn.Module, lora_file: Path) -> None:
    sources = {"file": lora_file, "folder": lora_file.parent, "less": Source(lora_file, scale=-0.5)}
    bank = DeltaBank.load(base, sources)
    assert bank.delta_hashes["file"] == bank.delta_hashes["folder"]
    ((name, part),) = bank.deltas[0].parts.items()
    shape = base.state_dict()[name].shape
    # A power of two: no rounding.
    assert torch.equal(bank.deltas[2].parts[name].full(shape), -0.5 * part.full(shape))
    assert bank.survey("file").support == {name: "low-rank"} and "-0.5" in bank.survey("less").origin


def test_a_peft_folder(base: torch.nn.Module, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(perturbed(base, 0.0), peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    bank = DeltaBank.load(base, {"a": tmp_path, "b": Source(tmp_path, format="peft")})
    assert bank.delta_hashes["a"] == bank.delta_hashes["b"]
    assert set(bank.survey("a").support.values()) == {"low-rank"}


def test_choices_that_a_source_does_not_have_are_refused(
    base: torch.nn.Module, other: torch.nn.Module, lora_file: Path, tmp_path: Path
) -> None:
    other.save_pretrained(folder := tmp_path / "folder")
    state = other.state_dict()
    for source, message in [
        (Source(state, scale=2.0), r"\['g'\]: must be a LoRA for scale=2, found format 'state_dict'"),
        (Source(folder, scale=2.0), "folder.*: must be a LoRA for scale=2, found format 'diffusers'"),
        (Source(state, variant="fp16"), "must be a diffusers folder for variant='fp16', found 'state_dict'"),
        (Source(lora_file, weights="ema"), "must have a moving average for weights='ema', found format 'lora'"),
        (Source(lora_file, format="partial"), "key '.*lora_A.weight' is not in the base"),
        (Source(folder, format="peft"), "must be of format 'peft', found 'diffusers'"),
        (Source(lora_file.parent, format="diffusers"), "must be of format 'diffusers', found 'lora'"),
        (Source(state, format="diffusers"), "must be of format 'diffusers', found 'state_dict'"),
        (Source(state, format="lora"), r"counterfactuals\['g'\]: "),
        (Source(state, format="compvis"), r"counterfactuals\['g'\]: "),
    ]:
        with pytest.raises(CheckpointError, match=message):
            DeltaBank.load(base, {"g": source})


def test_modules_keep_to_what_they_are(base: torch.nn.Module, other: torch.nn.Module) -> None:
    with pytest.raises(CheckpointError, match="must be of format 'diffusers', found 'state_dict'"):
        DeltaBank.load(base, {"g": Source(other, format="diffusers")})
    delta = Delta({"conv_in.bias": Dense(torch.ones(8))})
    with pytest.raises(ValueError, match="a Delta leaves no choice of format, weights, scale or variant"):
        DeltaBank.load(base, {"g": Source(delta, scale=2.0)})


@pytest.mark.parametrize("place", [".", "unet"])
def test_a_folder_with_a_model_and_adapters_must_say_which(
    base: torch.nn.Module, other: torch.nn.Module, lora_file: Path, tmp_path: Path, place: str
) -> None:
    other.save_pretrained(tmp_path / place)
    shutil.copy(lora_file, tmp_path)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: holds several, pytorch_lora_weights.*lora'.* and a model"):
        DeltaBank.load(base, {"g": tmp_path})
    named = {kind: Source(tmp_path, format=kind) for kind in ("lora", "diffusers")}  # type: ignore[arg-type]
    hashes = DeltaBank.load(base, {**named, "file": lora_file, "module": other}).delta_hashes
    assert hashes["lora"] == hashes["file"] != hashes["diffusers"] == hashes["module"]
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match="holds several, an adapter of PEFT .* and pytorch_lora_weights.* and a m"
    ):
        DeltaBank.load(base, {"g": tmp_path})
