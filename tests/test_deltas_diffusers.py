"""Model folders as diffusers saves them: every layout that loads, and what is wrong with bad ones."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from guda_fast.deltas import DeltaBank
from guda_fast.errors import CheckpointError

diffusers = pytest.importorskip("diffusers")
WEIGHTS = "diffusion_pytorch_model"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


@pytest.fixture(scope="module")
def other(base: torch.nn.Module) -> torch.nn.Module:
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("time_embedding"):
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def expected(base: torch.nn.Module, other: torch.nn.Module) -> DeltaBank:
    """The bank from modules in memory, which test_deltas.py checks against arithmetic."""
    return DeltaBank.load(base, {"g": other})


@pytest.fixture
def state(other: torch.nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in other.state_dict().items()}


SAVED: dict[str, dict[str, Any]] = {
    "safetensors": {},
    "bin": {"safe_serialization": False},
    "variant": {"variant": "fp16"},
    "sharded": {"max_shard_size": "30KB"},
    "sharded bin variant": {"max_shard_size": "30KB", "safe_serialization": False, "variant": "non_ema"},
}


@pytest.mark.parametrize("component", ["", "unet", "transformer"])
@pytest.mark.parametrize("how", SAVED)
def test_diffusers_folders(
    base: torch.nn.Module,
    other: torch.nn.Module,
    expected: DeltaBank,
    tmp_path: Path,
    how: str,
    component: str,
) -> None:
    base.save_pretrained(tmp_path / "base" / component, **SAVED[how])
    other.save_pretrained(tmp_path / "other" / component, **SAVED[how])
    if "shard" in how:
        assert len(list((tmp_path / "base" / component).glob("*-of-*"))) > 2
    random_state = torch.get_rng_state()
    bank = DeltaBank.load(tmp_path / "base", {"g": str(tmp_path / "other")})
    assert torch.equal(torch.get_rng_state(), random_state)
    assert type(bank.model) is type(base) and bank.scheduler is None
    assert bank.hash == expected.hash
    with bank.applied("g") as applied, expected.applied("g") as wanted:
        for name, tensor in wanted.state_dict().items():
            assert torch.equal(applied.state_dict()[name], tensor), name


def test_stored_precisions(base: torch.nn.Module, other: torch.nn.Module, tmp_path: Path) -> None:
    """A half-precision base is resident in float32 with its stored values; a double one stays double."""
    for dtype, resident in [(torch.float16, torch.float32), (torch.float64, torch.float64)]:
        stored = copy.deepcopy(base).to(dtype)
        stored.save_pretrained(tmp_path / str(dtype))
        bank = DeltaBank.load(tmp_path / str(dtype), {"g": other})
        for name, tensor in stored.state_dict().items():
            assert torch.equal(bank.model.state_dict()[name], tensor.to(resident)), name
            delta = bank.deltas[0].parts.get(name)
            difference = other.state_dict()[name].to(resident) - tensor.to(resident)
            assert torch.equal(torch.zeros_like(difference) if delta is None else delta.value, difference), name


@pytest.mark.parametrize("place", ["base", "base/scheduler", "scheduler"])
def test_scheduler_is_found(base: torch.nn.Module, state: State, tmp_path: Path, place: str) -> None:
    base.save_pretrained(tmp_path / "base")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=321)
    scheduler.save_pretrained(tmp_path / place)
    bank = DeltaBank.load(tmp_path / "base", {"g": state})
    assert bank.scheduler is not None and bank.scheduler["num_train_timesteps"] == 321
    for given in (scheduler, tmp_path / place, tmp_path / place / "scheduler_config.json"):
        config = DeltaBank.load(base, {"g": state}, scheduler=given).scheduler
        assert config is not None and (config["num_train_timesteps"], config["_class_name"]) == (
            321,
            "DDPMScheduler",
        )


def test_pipeline_folder(base: torch.nn.Module, state: State, tmp_path: Path) -> None:
    diffusers.DDPMPipeline(base, diffusers.DDPMScheduler(beta_end=0.03)).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "unet"):
        bank = DeltaBank.load(path, {"g": state})
        assert bank.scheduler is not None and bank.scheduler["beta_end"] == 0.03


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def test_configs_are_compared(base: torch.nn.Module, other: torch.nn.Module, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path / "base")
    other.save_pretrained(tmp_path / "other")
    # What an older diffusers did not write yet counts with its default; private keys do not count.
    edit_config(tmp_path / "other", downsample_type=..., _diffusers_version="0.1", _name_or_path="x")
    DeltaBank.load(tmp_path / "base", {"g": tmp_path / "other"})
    edit_config(tmp_path / "other", act_fn="gelu", norm_eps=1e-6)
    message = r"other/config.json: 'act_fn' must be 'silu' as in the base, found 'gelu', 'norm_eps' must be 1e-05 .*"
    for given in (tmp_path / "base", base):
        with pytest.raises(CheckpointError, match=message + "found 1e-06$"):
            DeltaBank.load(given, {"g": tmp_path / "other"})
    edit_config(tmp_path / "other", act_fn="silu", norm_eps=1e-5, _class_name="UNet1DModel")
    with pytest.raises(CheckpointError, match="'_class_name' must be 'UNet2DModel' as in the base, found 'UNet1DM"):
        DeltaBank.load(tmp_path / "base", {"g": tmp_path / "other"})
    deeper = diffusers.UNet2DModel(**{**base.config, "block_out_channels": (8, 32)})
    with pytest.raises(CheckpointError, match=r"\['g'\]: 'block_out_channels' must be \[8, 16\] .* found \[8, 32\]"):
        DeltaBank.load(base, {"g": deeper})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: must be JSON in UTF-8, found"),
        ("\xff", "config.json: must be JSON in UTF-8, found"),
        ("[1]", "config.json: must hold a JSON object, found list"),
        (
            '{"_class_name": "OrderedDict"}',
            "config.json: '_class_name' must be a model of diffusers .*'OrderedDict'",
        ),
        ('{"act_fn": "silu"}', "config.json: '_class_name' must be a model of diffusers .* found None"),
        (
            '{"_class_name": "UNet2DModel", "block_out_channels": [8, 12], "norm_num_groups": 5}',
            "config.json: UNet2DModel cannot be built",
        ),
    ],
)
def test_unusable_configs(base: torch.nn.Module, state: State, tmp_path: Path, text: str, message: str) -> None:
    base.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        DeltaBank.load(tmp_path, {"g": state})


@pytest.mark.parametrize("side", ["base", "counterfactual"])
def test_bad_keys_in_a_folder(base: torch.nn.Module, state: State, tmp_path: Path, side: str) -> None:
    base.save_pretrained(tmp_path)
    path = tmp_path / f"{WEIGHTS}.safetensors"
    shape = state | {"conv_in.weight": torch.ones(8, 3, 3, 3)}
    nan = state | {"conv_in.bias": torch.full((8,), float("nan"))}
    missing = {name: tensor for name, tensor in state.items() if name != "conv_out.bias"}
    for bad, message in [
        (shape, r"key 'conv_in.weight' must have shape \(8, 1, 3, 3\) as in the base, found \(8, 3, 3, 3\)"),
        (nan, "key 'conv_in.bias' must be finite, found 8 NaN or infinite of 8 values"),
        (missing, "key 'conv_out.bias' is missing"),
    ]:
        safetensors.torch.save_file(bad, path)
        message = f"^{path}: {message}"
        if side == "base":
            with pytest.raises(CheckpointError, match=message):
                DeltaBank.load(tmp_path, {"g": state})
        elif bad is nan:
            bank = DeltaBank.load(base, {"g": tmp_path})
            with pytest.raises(CheckpointError, match=message):
                bank.survey("g")
        else:  # found in the header
            with pytest.raises(CheckpointError, match=message):
                DeltaBank.load(base, {"g": tmp_path})


def test_unusable_folders(base: torch.nn.Module, state: State, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: no diffusers model here"):
        DeltaBank.load(base, {"g": tmp_path})
    base.save_pretrained(tmp_path / "unet")
    (weights := tmp_path / "unet" / f"{WEIGHTS}.safetensors").rename(tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/unet: no weights"):
        DeltaBank.load(base, {"g": tmp_path})
    with pytest.raises(CheckpointError, match="alone.safetensors: the base must be a diffusers folder"):
        DeltaBank.load(tmp_path / "alone.safetensors", {"g": state})
    for variant in ("ema", "fp16"):
        shutil.copy(tmp_path / "alone.safetensors", weights.with_suffix(f".{variant}.safetensors"))
    with pytest.raises(CheckpointError, match=r"unet: several variants \(ema, fp16\), pass the file"):
        DeltaBank.load(tmp_path, {"g": state})
    shutil.copytree(tmp_path / "unet", tmp_path / "transformer")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: holds several models, pass one of .*unet, .*transformer"):
        DeltaBank.load(tmp_path, {"g": state})


def test_plain_safetensors_come_first(base: torch.nn.Module, other: torch.nn.Module, tmp_path: Path) -> None:
    other.save_pretrained(tmp_path)
    base.save_pretrained(tmp_path, variant="fp16")
    (tmp_path / f"{WEIGHTS}.bin").write_bytes(b"not read")
    bank = DeltaBank.load(base, {"g": tmp_path})
    assert bank.deltas[0].origin == str(tmp_path / f"{WEIGHTS}.safetensors")


def test_damaged_shards(base: torch.nn.Module, other: torch.nn.Module, tmp_path: Path) -> None:
    other.save_pretrained(tmp_path, max_shard_size="30KB")
    index = tmp_path / f"{WEIGHTS}.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]

    def refused(weight_map: object, message: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            DeltaBank.load(base, {"g": tmp_path})

    shard = listed["conv_in.weight"]
    refused(None, f"^{index}: 'weight_map' must be an object, found NoneType")
    for outside in ("../x.safetensors", "/x.safetensors", "..", 3):
        refused(
            {**listed, "conv_in.weight": outside},
            f"^{index}: key 'conv_in.weight' must be in a file of this folder",
        )
    refused({**listed, "conv_in.gain": shard}, f"^{tmp_path}/{shard}: key 'conv_in.gain' is missing, .* lists it$")
    unlisted = {key: name for key, name in listed.items() if key != "conv_in.weight"}
    refused(unlisted, f"^{tmp_path}/{shard}: key 'conv_in.weight' is not listed for this file in {index.name}")
    (tmp_path / f"{WEIGHTS}.bin").write_bytes(b"")
    (tmp_path / f"{WEIGHTS}.safetensors").write_bytes(b"")
    refused(listed, f"^{tmp_path}: both whole and sharded weights")
    (tmp_path / f"{WEIGHTS}.safetensors").unlink()
    (tmp_path / shard).unlink()
    refused(listed, f"^{tmp_path}/{shard}: cannot be read: No such file")


def test_sharded_errors_name_the_shard(base: torch.nn.Module, other: torch.nn.Module, tmp_path: Path) -> None:
    spoiled = copy.deepcopy(other)
    with torch.no_grad():
        spoiled.conv_in.bias[1] = float("nan")
    spoiled.save_pretrained(tmp_path, max_shard_size="30KB")
    with pytest.raises(CheckpointError, match=r"-0000\d-of-0000\d.safetensors: key 'conv_in.bias' must be finite"):
        DeltaBank.load(base, {"g": tmp_path}).survey()
