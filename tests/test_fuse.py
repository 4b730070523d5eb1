"""`fuse`: the same outputs, the same parameters, and the original back."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from guda_fast.forward import fuse, fused_blocks, unfuse


def unet(**options: Any) -> UNet2DModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 16}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return randomized(UNet2DModel(**{**sizes, **blocks, "norm_num_groups": 16, **options}))


def conditional(**options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, norm_num_groups=16, cross_attention_dim=24,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **options,
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
    "scale_shift, classes": lambda: unet(resnet_time_scale_shift="scale_shift", num_class_embeds=3),
    "resnet resampling": lambda: unet(
        down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
    ),
    "skip": lambda: unet(
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    ),
    "conditional": conditional,
    "conditional, linear": lambda: conditional(use_linear_projection=True),
}
RESAMPLED_IN_CHANNELS_FIRST = {"skip"}  # by diffusers' FIR filters


def run(model: nn.Module, x: Tensor) -> Tensor:
    condition: dict[str, Tensor] = {}
    if getattr(model, "class_embedding", None) is not None:
        condition = {"class_labels": torch.arange(len(x)) % 3}
    if isinstance(model, UNet2DConditionModel):
        states = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        condition = {"encoder_hidden_states": states.expand(len(x), -1, -1)}
    with torch.no_grad():
        result: Tensor = model(x, torch.arange(len(x)) * 30, **condition, return_dict=False)[0]
    return result


def make_x(model: nn.Module, rows: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(rows, model.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(2))
    return x.to(dtype).to(memory_format=torch.channels_last)


def fused_kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(model.get_submodule(name)).__mro__[1] for name in fused_blocks(model)}


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What the blocks of a model give, by name; "" is the model."""
    found = {}
    kinds = (ResnetBlock2D, Attention, Transformer2DModel, Upsample2D, Downsample2D)
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    handles = [
        block.register_forward_hook(
            lambda _module, _args, out, name=name: found.__setitem__(name, out if isinstance(out, Tensor) else out[0])
        )
        for name, block in blocks.items()
    ]
    found[""] = run(model, x)
    for handle in handles:
        handle.remove()
    assert len(found) == len(blocks) + 1
    return found


class Convolutions(TorchDispatchMode):
    """Notes which convolutions read channels-last, wherever they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.in_channels_last: list[bool] = []
        self.ours = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.convolution.default, torch.ops.guda_fast.conv3x3.default):
            self.in_channels_last.append(args[0].is_contiguous(memory_format=torch.channels_last))
            self.ours += function is torch.ops.guda_fast.conv3x3.default
        return function(*args, **(kwargs or {}))


def lost(found: dict[str, Tensor]) -> list[str]:
    """Which of these are not in channels-last."""
    images = {name: out for name, out in found.items() if out.dim() == 4 and out.shape[1] > 3}
    return [name for name, out in images.items() if not out.is_contiguous(memory_format=torch.channels_last)]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_as_near_to_float64_as_before(name: str) -> None:
    model = MODELS[name]().to(memory_format=torch.channels_last)
    x = make_x(model)
    exact = run(copy.deepcopy(model).double(), x.double())
    before = run(model, x)
    fuse(model)
    blocks = [module for module in model.modules() if isinstance(module, ResnetBlock2D | nn.GroupNorm)]
    assert len(blocks) > 12
    assert {type(block) for block in blocks}.isdisjoint({ResnetBlock2D, nn.GroupNorm})
    after = outputs(model, x)
    error, rival = (float((out.double() - exact).abs().max()) for out in (after[""], before))
    assert error <= 2 * rival
    assert float((after[""] - before).abs().max()) > 0
    assert after[""].stride() == before.stride()
    assert lost(after) == [] or name in RESAMPLED_IN_CHANNELS_FIRST
    assert torch.equal(run(unfuse(model), x), before)
    assert fused_blocks(model) == []


def test_channels_first_models_give_the_same() -> None:
    model = unet()
    x = make_x(model).contiguous()
    before = run(model, x)
    torch.testing.assert_close(run(fuse(model), x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name: str) -> None:
    model = MODELS[name]()
    x = make_x(model)
    exact = run(copy.deepcopy(model).double(), x.double())
    model = model.bfloat16().to(memory_format=torch.channels_last)
    before = run(model, x.bfloat16())
    after = outputs(fuse(model), x.bfloat16())
    assert after[""].dtype == torch.bfloat16
    error, rival = ((out.double() - exact).square().mean() for out in (after[""], before))
    assert float(error) <= 4 * float(rival)
    assert lost(after) == [] or name in RESAMPLED_IN_CHANNELS_FIRST


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["default", "resnet resampling", "conditional", "conditional, linear"])
def test_a_batch_of_64_stays_in_channels_last(name: str, dtype: torch.dtype) -> None:
    """From there on diffusers makes activations contiguous before it resamples them."""
    model = MODELS[name]().to(dtype, memory_format=torch.channels_last)
    x = make_x(model, rows=65, dtype=dtype)
    with Convolutions() as plain:
        before = run(model, x)
    assert not all(plain.in_channels_last), "the trap is gone, and so is the reason for this test"
    fuse(model)
    with Convolutions() as fused:
        after = run(model, x)
    assert len(fused.in_channels_last) == len(plain.in_channels_last)
    assert all(fused.in_channels_last)
    assert lost(outputs(model, x)) == []
    # Of activations around 1; in bfloat16 the two differ by the roundings of some ten layers.
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance)


def test_convolutions_run_the_op() -> None:
    """Those that it expresses, in float32, and with the parameters of the moment."""
    model = fuse(unet()).to(memory_format=torch.channels_last)
    convolutions = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    expressed = [name for name in convolutions if name.endswith(("conv1", "conv2")) or "upsamplers" in name]
    assert [name for name, kind in convolutions.items() if kind is not nn.Conv2d] == expressed
    for dtype, calls in ((torch.float32, len(expressed)), (torch.bfloat16, 0)):
        with Convolutions() as called:
            run(model.to(dtype), make_x(model, rows=2, dtype=dtype))
        assert called.ours == calls
    conv = model.to(torch.float32).mid_block.resnets[0].conv1
    x = torch.randn(4, 64, 8, 8).to(memory_format=torch.channels_last)
    for _ in range(2):
        with torch.no_grad():
            conv.weight.add_(torch.randn_like(conv.weight) * 0.1)
            expected = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
            torch.testing.assert_close(conv(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_upsampling_beyond_32_bits_is_left_to_diffusers() -> None:
    layer = Upsample2D(2).to("meta")
    small, large = (torch.empty((64, 2, size, 2**12), device="meta") for size in (2**4, 2**10))
    small, large = (x.to(memory_format=torch.channels_last) for x in (small, large))
    with torch.no_grad():
        assert fuse(layer)(small).is_contiguous(memory_format=torch.channels_last)
        assert layer(large).is_contiguous()
        assert layer(small, output_size=(32, 2**13)).is_contiguous()


def test_hooks_inside_a_block_are_called() -> None:
    model = unet().to(memory_format=torch.channels_last)
    x, seen = make_x(model), []
    block = model.mid_block.resnets[0]
    for layer in (block.norm1, block.conv2):
        layer.register_forward_hook(lambda _module, _args, out: seen.append((out, out.clone())))
    expected = run(model, x)
    plain = [kept for kept, _ in seen]
    seen.clear()
    torch.testing.assert_close(run(fuse(model), x), expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == 2
    for (kept, at_once), without in zip(seen, plain, strict=True):
        assert torch.equal(kept, at_once), "what a hook keeps was written into"
        torch.testing.assert_close(kept, without, rtol=1e-4, atol=1e-4)


def test_copies_are_fused_too() -> None:
    model = fuse(unet().to(memory_format=torch.channels_last))
    x = make_x(model)
    expected = run(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert fused_blocks(other) == fused_blocks(model)
        assert torch.equal(run(other, x), expected)
        unfuse(other)
    assert fused_blocks(model)


def test_autocast_runs_the_original() -> None:
    model = unet().to(memory_format=torch.channels_last)
    x = make_x(model)
    with torch.autocast("cpu", torch.bfloat16):
        before = run(model, x)
        assert torch.equal(run(fuse(model), x), before)


def test_a_fused_block_compiles_into_one_graph() -> None:
    block = fuse(ResnetBlock2D(in_channels=32, out_channels=64, temb_channels=8)).eval()
    x = torch.randn(2, 32, 4, 4).to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        result, expected = compiled(x, torch.ones(2, 8)), block(x, torch.ones(2, 8))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert result.stride() == expected.stride()


def test_one_time_embedding_for_all_rows() -> None:
    block = ResnetBlock2D(in_channels=32, temb_channels=8).eval()
    x, temb = torch.randn(3, 32, 4, 4).to(memory_format=torch.channels_last), torch.randn(1, 8)
    with torch.no_grad():
        expected = block(x, temb)
        torch.testing.assert_close(fuse(block)(x, temb), expected, rtol=1e-5, atol=1e-5)
    without = ResnetBlock2D(in_channels=32, temb_channels=None, output_scale_factor=2.0).eval()
    with torch.no_grad():
        expected = without(x, None)
        torch.testing.assert_close(fuse(without)(x, None), expected, rtol=1e-5, atol=1e-5)


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
                if any(part in name for part in ("norm", "time_emb_proj", "conv1.bias")):
                    parameter.mul_(1.5)
    swapped = run(model, x)
    torch.testing.assert_close(swapped, run(plain, x), rtol=1e-4, atol=1e-4)
    assert float((swapped - first).abs().max()) > 1e-2


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
    names = fused_blocks(fuse(blocks))
    assert "2" in names
    assert not {"0", "1"} & set(names)
    for call in (fuse, unfuse):
        with pytest.raises(TypeError, match=rf"{call.__name__}: model must be a torch.nn.Module, got str"):
            call("unet")


def test_hooks_on_every_module_see_what_they_saw() -> None:
    model, calls = MODELS["default"]().to(memory_format=torch.channels_last), []
    x = make_x(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: calls.append(module))
    try:
        run(model, x)
        before = len(calls)
        run(fuse(model), x)
    finally:
        handle.remove()
    assert len(calls) == 2 * before


def test_a_norm_or_an_activation_may_be_replaced() -> None:
    """No fused module relies on another one being fused."""
    model, plain = MODELS["default"](), MODELS["default"]()
    x = make_x(model)
    fuse(model)
    for unet in (model, plain):
        unet.conv_act = nn.Identity()
        unet.conv_norm_out = nn.GroupNorm(4, unet.conv_norm_out.num_channels)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(run(model, x), run(plain, x))


def test_a_fused_unet_knows_its_dtype_and_is_saved_under_its_own_name(tmp_path: Path) -> None:
    model = fuse(unet())
    assert "" in fused_blocks(model)
    for dtype in (torch.float64, torch.bfloat16):
        assert model.to(dtype).dtype == dtype
    model.save_pretrained(tmp_path)
    assert type(UNet2DModel.from_pretrained(tmp_path)) is UNet2DModel
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DModel"


def test_a_unet_that_casts_layer_by_layer_asks_diffusers_for_its_dtype() -> None:
    model = unet().to(torch.bfloat16)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert "" not in fused_blocks(fuse(model))
    assert model.dtype == torch.bfloat16


def test_a_parametrized_module_is_named_not_forgotten() -> None:
    from torch.nn.utils import parametrize

    model = fuse(MODELS["default"]())
    parametrize.register_parametrization(model.conv_norm_out, "weight", nn.Identity())
    assert "conv_norm_out" in fused_blocks(model)
    with pytest.raises(TypeError, match="unfuse: fused modules must be of the class that fuse gave them, got Param"):
        unfuse(model)
    assert len(fused_blocks(model)) > 12
    parametrize.remove_parametrizations(model.conv_norm_out, "weight")
    assert fused_blocks(unfuse(model)) == []


def test_upsampling_refuses_what_the_original_refuses() -> None:
    from diffusers.models.upsampling import Upsample2D

    with torch.no_grad(), pytest.raises(AssertionError):
        fuse(Upsample2D(8, use_conv=False))(torch.randn(1, 4, 2, 2))
