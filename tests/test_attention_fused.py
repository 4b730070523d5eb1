"""`FusedAttention`: the results of diffusers' attention, where it computes what the op does, and its code elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from guda_fast import ops
from guda_fast.forward import _fused_attention, fuse, fused_blocks, unfuse


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of q with which the op was called."""
    seen: list[tuple[int, ...]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append(tuple(q.shape))
        return ops.attention(q, k, v, **options)

    monkeypatch.setattr(_fused_attention, "ops", type("Ops", (), {"attention": staticmethod(attention)}))
    return seen


def block(**options: Any) -> Attention:
    """As UNets have it beside their residual blocks, with weights that show."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"query_dim": 24, "heads": 3, "dim_head": 8, "bias": True}
    attention = Attention(**{**sizes, **options}).eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return attention


def tokens(length: int = 20, width: int = 24, rows: int = 2) -> Tensor:
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(length))


def image() -> Tensor:
    """A channels-last map, whose tokens are a view."""
    return tokens(20).unflatten(1, (4, 5)).permute(0, 3, 1, 2)


IN_UNETS = {"norm_num_groups": 4, "residual_connection": True}
EXPRESSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "as in UNets": IN_UNETS,
    "rescaled": {**IN_UNETS, "rescale_output_factor": 2.0},
    "older processor": {"processor": AttnProcessor()},
    "unscaled": {"scale_qk": False},
    "upcast": {"processor": AttnProcessor(), "upcast_attention": True, "upcast_softmax": True},
    "other widths": {"dim_head": 5, "heads": 4, "out_dim": 20},
    "cross": {"cross_attention_dim": 7},
}


@pytest.mark.parametrize("name", EXPRESSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_those_of_diffusers(name: str, dtype: torch.dtype, calls: list[tuple[int, ...]]) -> None:
    attention = block(**EXPRESSED[name]).to(dtype)
    in_float64 = copy.deepcopy(attention).double()
    in_float64.upcast_attention = in_float64.upcast_softmax = False  # to float32
    context = {"encoder_hidden_states": tokens(11, 7).to(dtype)} if name == "cross" else {}
    inputs = [tokens().to(dtype)]
    if name != "other widths":
        inputs += [image().to(dtype), image().contiguous().to(dtype)]
    for x in inputs:
        with torch.no_grad():
            exact = in_float64(x.double(), **{name: tensor.double() for name, tensor in context.items()})
            before = attention(x, **context)
            after = fuse(attention)(x, **context)
            assert len(calls) == 1
            calls.clear()
            assert torch.equal(unfuse(attention)(x, **context), before)
        error, rival = ((out.double() - exact).abs().max() for out in (after, before))
        rounding = torch.finfo(dtype).eps / 2 * exact.abs().max()
        assert float(error) <= 2 * float(rival) + float(rounding)
        assert after.dtype == dtype
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            assert after.is_contiguous(memory_format=torch.channels_last)


def test_float64_stays_float64() -> None:
    original, fused = (attention.double() for attention in original_and_fused(**IN_UNETS))
    with torch.no_grad():
        torch.testing.assert_close(fused(image().double()), original(image().double()), rtol=1e-13, atol=1e-13)


NOT_EXPRESSED: dict[str, dict[str, Any]] = {
    "norms of q and k": {"qk_norm": "layer_norm"},
    "norm of the context": {"cross_attention_dim": 7, "cross_attention_norm": "layer_norm"},
    "a second projection": {"added_kv_proj_dim": 7},
    "a spatial norm": {"query_dim": 32, "spatial_norm_dim": 5},
    "fewer key heads": {"kv_heads": 1},
    "no output projection": {"pre_only": True},
}


@pytest.mark.parametrize("name", NOT_EXPRESSED)
def test_what_the_op_does_not_express_is_left_alone(name: str) -> None:
    attention = block(**NOT_EXPRESSED[name])
    assert "" not in fused_blocks(fuse(attention))
    assert type(attention) is Attention


def test_subclasses_are_left_alone() -> None:
    class Own(Attention):
        pass

    assert fused_blocks(fuse(Own(query_dim=8, heads=1, dim_head=8))) == []


def test_other_processors_run_themselves(calls: list[tuple[int, ...]]) -> None:
    class Own(AttnProcessor2_0):
        def __call__(self, attn: Attention, hidden_states: Tensor, **options: Any) -> Tensor:
            return hidden_states * 0

    attention = fuse(block())
    attention.set_processor(Own())
    with torch.no_grad():
        assert not attention(tokens()).any()
        attention.set_processor(AttnProcessor2_0())
        assert attention(tokens()).any()
    assert len(calls) == 1
    attention.set_attention_slice(1)
    with torch.no_grad():
        attention(tokens())
    assert len(calls) == 1


def original_and_fused(**options: Any) -> tuple[Attention, Attention]:
    attention = block(**options)
    return copy.deepcopy(attention), fuse(attention)


def test_masks_run_the_original(calls: list[tuple[int, ...]]) -> None:
    original, fused = original_and_fused()
    mask = torch.zeros(2, 1, 20)
    mask[:, :, 5:] = -1e4
    with torch.no_grad():
        assert torch.equal(fused(tokens(), attention_mask=mask), original(tokens(), attention_mask=mask))
    assert calls == []


def test_gradients_autocast_and_hooks_on_all_run_the_original(calls: list[tuple[int, ...]]) -> None:
    original, fused = original_and_fused(**IN_UNETS)
    assert torch.equal(fused(image()), original(image()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(image()), original(image()))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with torch.no_grad():
            assert torch.equal(fused(image()), original(image()))
    finally:
        handle.remove()
    assert calls == []


def test_unknown_options_reach_the_original(calls: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture) -> None:
    original, fused = original_and_fused()
    with torch.no_grad():
        assert torch.equal(fused(tokens(), gligen=1), original(tokens(), gligen=1))
        assert calls == []
        fused(tokens(), temb=torch.zeros(2, 3))  # which UNets pass to every attention
    assert len(calls) == 1


def test_projections_are_called_as_modules() -> None:
    original, fused = original_and_fused(**IN_UNETS)
    names = ["group_norm", "to_q", "to_k", "to_v", "to_out.0", "to_out.1"]
    counts = {"original": 0, "fused": 0}
    for kind, attention in (("original", original), ("fused", fused)):
        for name in names:
            attention.get_submodule(name).register_forward_hook(
                lambda *_, kind=kind: counts.__setitem__(kind, counts[kind] + 1)
            )
        attention.to_v = nn.Sequential(attention.to_v, nn.Tanh())
        with torch.no_grad():
            attention(image())
    assert counts["fused"] == counts["original"] == len(names)
    with torch.no_grad():
        torch.testing.assert_close(fused(image()), original(image()), rtol=1e-5, atol=1e-5)


def test_dropout_stays_where_it_was() -> None:
    original, fused = original_and_fused(dropout=0.5)
    results = []
    for attention in (original.train(), fused.train()):
        torch.manual_seed(3)
        with torch.no_grad():
            results.append(attention(tokens()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert (results[1] == 0).any() or not torch.equal(results[1], fused.eval()(tokens()))


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, norm_num_groups=16, **blocks
    ).eval()


def conditional() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, norm_num_groups=16, cross_attention_dim=24,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("make", [unet, conditional])
def test_every_attention_of_a_unet(make: Any, calls: list[tuple[int, ...]]) -> None:
    model = make().to(memory_format=torch.channels_last)
    keys = list(model.state_dict())
    x = torch.randn(2, model.config.in_channels, 16, 16).to(memory_format=torch.channels_last)
    context = {"encoder_hidden_states": torch.randn(2, 5, 24)} if isinstance(model, UNet2DConditionModel) else {}
    with torch.no_grad():
        before = model(x, 3, **context, return_dict=False)[0]
        number = sum(isinstance(module, Attention) for module in model.modules())
        after = fuse(model)(x, 3, **context, return_dict=False)[0]
        assert len(calls) == number > 3
        assert list(model.state_dict()) == keys
        # Of activations around 1, through some twenty layers.
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        assert torch.equal(unfuse(model)(x, 3, **context, return_dict=False)[0], before)
    assert len(calls) == number


def test_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    attention = fuse(block(**IN_UNETS))
    with torch.no_grad():
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        result, expected = compiled(image()), attention(image())
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert result.stride() == expected.stride()
