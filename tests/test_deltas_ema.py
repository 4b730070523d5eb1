"""Moving averages as diffusers' EMAModel writes them, beside the weights that a training script kept."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch

from guda_fast.deltas import DeltaBank, Source
from guda_fast.errors import CheckpointError
from tiny import perturbed, tiny_unet

pytest.importorskip("diffusers")
from diffusers.training_utils import EMAModel


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return tiny_unet()


@pytest.fixture(scope="module")
def other(base: torch.nn.Module) -> torch.nn.Module:
    return perturbed(base)


@pytest.fixture
def average(base: torch.nn.Module, other: torch.nn.Module) -> EMAModel:
    """The average of a run from the base to the other, which is neither."""
    ema = EMAModel(base.parameters(), decay=0.5, model_cls=type(base), model_config=base.config)
    for model in (perturbed(base, seed=7), other, other):  # the first step copies
        ema.step(model.parameters())
    return ema


@pytest.fixture
def expected(base: torch.nn.Module, other: torch.nn.Module, average: EMAModel) -> str:
    """The hash of the averaged model's delta, from a module that EMAModel itself filled."""
    filled = copy.deepcopy(base)
    average.copy_to(filled.parameters())
    hashes = DeltaBank.load(base, {"average": filled, "raw": other}).delta_hashes
    assert hashes["average"] != hashes["raw"]
    return hashes["average"]


def hashes(base: torch.nn.Module, **sources: object) -> dict[str, str]:
    return DeltaBank.load(base, sources).delta_hashes  # type: ignore[arg-type]


def test_shadow_parameters_beside_the_weights(
    base: torch.nn.Module, other: torch.nn.Module, average: EMAModel, expected: str, tmp_path: Path
) -> None:
    other.save_pretrained(tmp_path)
    torch.save(average.state_dict(), shadows := tmp_path / "ema_model.pt")
    found = hashes(
        base,
        raw=tmp_path,
        module=other,
        ema=Source(tmp_path, weights="ema"),
        format=Source(tmp_path, format="ema"),
        file=shadows,
        memory=average.state_dict(),
    )
    assert found.pop("raw") == found.pop("module")
    assert set(found.values()) == {expected}


def test_a_model_folder_of_its_own(
    base: torch.nn.Module, other: torch.nn.Module, average: EMAModel, expected: str, tmp_path: Path
) -> None:
    """The layout that diffusers' training scripts give accelerate's checkpoints."""
    other.save_pretrained(tmp_path / "unet")
    average.save_pretrained(tmp_path / "unet_ema")
    found = hashes(
        base,
        raw=tmp_path,
        module=other,
        ema=Source(tmp_path, weights="ema"),
        folder=tmp_path / "unet_ema",
        both=Source(tmp_path / "unet_ema", weights="ema"),
    )
    assert found.pop("raw") == found.pop("module")
    assert set(found.values()) == {expected}
    bank = DeltaBank.load(tmp_path / "unet_ema", {"g": other})  # the average's settings are no part of the model's
    assert bank.delta_hashes == hashes(bank.model, g=other)


def test_a_pipeline_folder_with_shadow_parameters_inside(
    base: torch.nn.Module, other: torch.nn.Module, average: EMAModel, expected: str, tmp_path: Path
) -> None:
    other.save_pretrained(tmp_path / "unet")
    torch.save(average.state_dict(), tmp_path / "unet" / "ema_model.pt")
    assert hashes(base, g=Source(tmp_path, weights="ema")) == {"g": expected}
    average.save_pretrained(tmp_path / "unet_ema")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: must hold one moving average, found .*unet_ema, .*unet$"):
        hashes(base, g=Source(tmp_path, weights="ema"))


def test_averages_that_do_not_fit(
    base: torch.nn.Module, other: torch.nn.Module, average: EMAModel, tmp_path: Path
) -> None:
    other.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: must hold one moving average, found no ema_model.pt"):
        hashes(base, g=Source(tmp_path, weights="ema"))
    count = len(average.shadow_params)
    path = tmp_path / "ema_model.pt"
    for state, message in [
        (
            {**average.state_dict(), "shadow_params": average.shadow_params[1:]},
            f"{count} parameters, found {count - 1}",
        ),
        ({**average.state_dict(), "shadow_params": average.shadow_params[::-1]}, "must have shape .* as in the base"),
        (other.state_dict(), "must hold 'shadow_params', as EMAModel.state_dict.. gives them, found 'conv_in.weight'"),
    ]:
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=f"^{path}: .*{message}"):
            hashes(base, g=Source(path, format="ema"))
    with pytest.raises(
        CheckpointError, match="must have a moving average for weights='ema', found format 'state_dict'"
    ):
        hashes(base, g=Source(other.state_dict(), weights="ema"))
    average.shadow_params[0] = torch.full_like(average.shadow_params[0], float("nan"))
    torch.save(average.state_dict(), path)
    with pytest.raises(CheckpointError, match=f"^{path}: key 'conv_in.weight' must be finite"):
        DeltaBank.load(base, {"g": path}).survey()


def test_shadow_parameters_by_their_numbers(
    base: torch.nn.Module, average: EMAModel, expected: str, tmp_path: Path
) -> None:
    """A safetensors header has 10 before 2."""
    shadows = {f"shadow_params.{at}": value for at, value in enumerate(average.shadow_params)}
    safetensors.torch.save_file(shadows, path := tmp_path / "ema.safetensors")
    assert hashes(base, g=path) == {"g": expected}
    shadows["shadow_params.100000"] = shadows.pop("shadow_params.5")
    with pytest.raises(CheckpointError, match="key 'shadow_params.5' is missing, of .* numbered from 0 on"):
        hashes(base, g=shadows)


def test_a_file_with_weights_and_average_gives_what_is_asked_for(
    base: torch.nn.Module, other: torch.nn.Module, average: EMAModel, expected: str, tmp_path: Path
) -> None:
    torch.save({"unet_state_dict": other.state_dict(), **average.state_dict()}, both := tmp_path / "both.pt")
    torch.save(average.state_dict(), alone := tmp_path / "ema.pt")
    beside = {**other.state_dict(), "shadow_params": average.shadow_params}
    found = hashes(
        base,
        raw=other,
        plain=both,
        asked=Source(both, weights="raw"),
        memory=beside,
        average=Source(both, weights="ema"),
        format=Source(beside, format="ema"),
        alone=alone,
    )
    assert {name for name, value in found.items() if value == expected} == {"average", "format", "alone"}
    assert len(set(found.values())) == 2
    with pytest.raises(CheckpointError, match=f"^{alone}: must have the weights themselves for weights='raw', found"):
        hashes(base, g=Source(alone, weights="raw"))
