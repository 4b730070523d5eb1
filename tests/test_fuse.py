"""`fuse`: the same outputs, the same parameters, and the original back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from guda_fast.forward.fuse import fuse, fused_blocks, unfuse


def unet(**options: Any) -> UNet2DModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 16}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return randomized(UNet2DModel(**{**sizes, **blocks, "norm_num_groups": 16, **options}))


def conditional() -> UNet2DConditionModel:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, norm_num_groups=16, cross_attention_dim=24,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return randomized(model)


def randomized(model: nn.Module) -> Any:
    """Norms start as ones and zeros, which would hide that they are not used."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


MODELS = {
    "default": lambda: unet(),
    "scale_shift": lambda: unet(resnet_time_scale_shift="scale_shift"),
    "resnet resampling": lambda: unet(
        down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
    ),
    "conditional": conditional,
}


def run(model: nn.Module, x: Tensor) -> Tensor:
    condition = {}
    if isinstance(model, UNet2DConditionModel):
        states = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        condition = {"encoder_hidden_states": states.expand(len(x), -1, -1)}
    with torch.no_grad():
        result: Tensor = model(x, torch.arange(len(x)) * 30, **condition, return_dict=False)[0]
    return result


def make_x(model: nn.Module, rows: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(rows, model.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(2))
    return x.to(dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_outputs_are_as_near_to_float64_as_before(name: str, layout: torch.memory_format) -> None:
    model = MODELS[name]().to(memory_format=layout)
    x = make_x(model)
    exact = run(copy.deepcopy(model).double(), x.double())
    before = run(model, x)
    assert len(fused_blocks(fuse(model))) == sum(isinstance(block, ResnetBlock2D) for block in model.modules()) > 3
    after = run(model, x)
    error, rival = (float((out.double() - exact).abs().max()) for out in (after, before))
    assert error <= 2 * rival
    assert float((after - before).abs().max()) > 0 or layout != torch.channels_last
    assert after.stride() == before.stride()
    assert torch.equal(run(unfuse(model), x), before)
    assert fused_blocks(model) == []


def test_bfloat16() -> None:
    model = unet()
    x = make_x(model)
    exact = run(copy.deepcopy(model).double(), x.double())
    model = model.bfloat16().to(memory_format=torch.channels_last)
    before = run(model, x.bfloat16())
    after = run(fuse(model), x.bfloat16())
    assert after.dtype == torch.bfloat16
    error, rival = ((out.double() - exact).square().mean() for out in (after, before))
    assert float(error) <= 4 * float(rival)


def test_a_batch_of_64() -> None:
    """From there on diffusers makes activations contiguous before it resamples them."""
    model = MODELS["resnet resampling"]().to(memory_format=torch.channels_last)
    x = make_x(model, rows=64)
    before = run(model, x)
    torch.testing.assert_close(run(fuse(model), x), before, rtol=1e-4, atol=1e-4)


def test_parameters_and_keys_are_the_models_own() -> None:
    model = unet().to(memory_format=torch.channels_last)
    x, plain = make_x(model), copy.deepcopy(model)
    keys, parameters = list(model.state_dict()), {name: id(p) for name, p in model.named_parameters()}
    fuse(fuse(model))
    assert list(model.state_dict()) == keys
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    first = run(model, x)
    with torch.no_grad():
        for changed in (model, plain):
            for name, parameter in changed.named_parameters():
                if "norm" in name or "time_emb_proj" in name:
                    parameter.mul_(1.5)
    swapped = run(model, x)
    torch.testing.assert_close(swapped, run(plain, x), rtol=1e-4, atol=1e-4)
    assert float((swapped - first).abs().max()) > 1e-2
    assert len(fused_blocks(copy.deepcopy(model))) == len(fused_blocks(model))


def test_gradients_are_the_originals() -> None:
    model = unet()
    x, plain = make_x(model), copy.deepcopy(model)
    for one in (fuse(model), plain):
        one(x, 3, return_dict=False)[0].square().sum().backward()
    for fused, original in zip(model.parameters(), plain.parameters(), strict=True):
        assert fused.grad is not None
        assert torch.equal(fused.grad, original.grad)


def test_what_cannot_be_expressed_is_left_alone() -> None:
    class Own(ResnetBlock2D):
        pass

    sizes: dict[str, Any] = {"in_channels": 32, "temb_channels": 8}
    blocks = nn.ModuleList([ResnetBlock2D(**sizes, non_linearity="mish"), Own(**sizes), ResnetBlock2D(**sizes)])
    assert fused_blocks(fuse(blocks)) == ["2"]
    for call in (fuse, unfuse):
        with pytest.raises(TypeError, match=rf"{call.__name__}: model must be a torch.nn.Module, got str"):
            call("unet")
