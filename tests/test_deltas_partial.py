"""State dicts with some of the parameters, as concept-erasing tools save them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from guda_fast.deltas import DeltaBank, Source
from guda_fast.errors import CheckpointError
from ldm import tiny_conditional_unet
from tiny import perturbed

pytest.importorskip("diffusers")
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return tiny_conditional_unet()


@pytest.fixture(scope="module")
def state(base: torch.nn.Module) -> State:
    return dict(perturbed(base).state_dict())


@pytest.fixture(scope="module")
def part(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if "attn2.to_k" in name or "attn2.to_v" in name}


def test_the_rest_equals_the_base(base: torch.nn.Module, part: State, tmp_path: Path) -> None:
    safetensors.torch.save_file(part, tmp_path / "uce.safetensors")
    torch.save({"unet": part, "text_encoder": {}}, tmp_path / "delta.bin")
    torch.save({f"module.{name}": tensor for name, tensor in part.items()}, tmp_path / "wrapped.pt")
    whole = {**base.state_dict(), **part}
    bank = DeltaBank.load(base, {"whole": whole, "memory": part, **{path.name: path for path in tmp_path.iterdir()}})
    assert len(bank) == 5 and len(set(bank.delta_hashes.values())) == 1
    assert bank.survey("memory").support.keys() == part.keys()


def test_a_part_with_more_than_half_must_be_called_one(base: torch.nn.Module, state: State) -> None:
    names = list(state)
    half, more = ({name: state[name] for name in names[:count]} for count in (len(names) // 2, len(names) // 2 + 1))
    assert DeltaBank.load(base, {"g": half}).survey("g").support.keys() == half.keys()
    with pytest.raises(
        CheckpointError, match=r"is missing .*; pass Source\(..., format=\"partial\"\), .*if the rest equal"
    ):
        DeltaBank.load(base, {"g": more})
    assert DeltaBank.load(base, {"g": Source(more, format="partial")}).survey("g").support.keys() == more.keys()
    with pytest.raises(CheckpointError, match="is missing") as caught:
        DeltaBank.load(base, {"g": Source(half, format="state_dict")})
    assert "partial" not in str(caught.value)


def test_folders_are_never_parts(base: torch.nn.Module, part: State, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path)
    safetensors.torch.save_file(part, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"key 'conv_in.weight' is missing \(and \d+ more keys\)$"):
        DeltaBank.load(base, {"g": tmp_path})


@pytest.mark.parametrize("kind", [None, "partial"])
def test_keys_that_are_not_the_bases_are_refused(base: torch.nn.Module, part: State, kind: Any) -> None:
    for key, message in [
        ("conv_in.gain", "key 'conv_in.gain' is not in the base"),
        ("text_encoder.text_model.final_layer_norm.bias", "key 'text_encoder.*' belongs to a text encoder"),
        ("text_model.embeddings.token_embedding.weight", "key 'text_model.*' belongs to a text encoder"),
        ("cond_stage_model.transformer.x", "key 'cond_stage_model.*' belongs to a text encoder"),
    ]:
        with pytest.raises(CheckpointError, match=rf"^counterfactuals\['g'\]: .*{message}"):
            DeltaBank.load(base, {"g": Source({**part, key: torch.ones(1)}, format=kind)})


def test_a_changed_text_encoder_beside_the_unet_is_refused(base: torch.nn.Module, part: State, tmp_path: Path) -> None:
    """Concept ablation of a token: the denoiser's part alone would be half of the counterfactual."""
    torch.save({"unet": part, "text_encoder": {"text_model.x": torch.ones(1)}}, path := tmp_path / "delta.bin")
    with pytest.raises(CheckpointError, match=f"^{path}: key 'text_encoder' belongs to a text encoder, which the base"):
        DeltaBank.load(base, {"g": path})


def test_a_base_that_holds_a_text_encoder_has_its_keys(part: State) -> None:
    base = torch.nn.ModuleDict({"text_model": torch.nn.Linear(2, 2), "denoiser": torch.nn.Linear(2, 2)})
    found = DeltaBank.load(base, {"g": {"text_model.weight": torch.ones(2, 2)}}).survey("g")
    assert found.support.keys() == {"text_model.weight"}


def test_a_shard_of_a_model_is_no_part(base: torch.nn.Module, state: State, tmp_path: Path) -> None:
    """Neither by its name nor by the index that lists it; unless it is called one."""
    perturbed(base).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = min(tmp_path.glob("*-of-*.safetensors"))
    renamed = tmp_path / "first.safetensors"
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    (alone := tmp_path / "alone").mkdir()
    shutil.copy(shard, alone)
    shutil.copy(shard, renamed)
    index.write_text(index.read_text().replace(shard.name, renamed.name))
    for path in (alone / shard.name, renamed):
        with pytest.raises(
            CheckpointError, match=f"^{path}: key '.*' is missing .*; this is one shard of a model, whos"
        ):
            DeltaBank.load(base, {"g": path})
        bank = DeltaBank.load(base, {"g": Source(path, format="partial")})
        assert 0 < len(bank.survey("g").support) < len(state) / 2


def test_a_module_is_whole() -> None:
    base = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    with pytest.raises(CheckpointError, match="key '1.weight' is missing"):
        DeltaBank.load(base, {"g": torch.nn.Sequential(torch.nn.Linear(2, 2))})
