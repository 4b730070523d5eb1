"""LoRA files of diffusers and of kohya's scripts: read, and as diffusers itself computes them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from adapter_cases import check_forwards, check_weights, conditional, randomised, shapes
from guda_fast.deltas import DeltaBank, Source
from guda_fast.deltas.formats.lora import converted, is_lora
from guda_fast.deltas.formats.state_dict import from_mapping, open_file
from guda_fast.deltas.weights import Weights
from guda_fast.errors import CheckpointError

State = dict[str, Tensor]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYWHERE = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv_in", "time_emb_proj"]
OLD = {".lora_A.": "_lora.down.", ".lora_B.": "_lora.up.", ".to_out.0_lora": ".to_out_lora", ".to_": ".processor.to_"}


def trained(targets: list[str], make: Callable[[], nn.Module] = conditional, **config: Any) -> Any:
    """A diffusers model with an adapter whose values are those of a long training."""
    net: Any = make()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 3, "target_modules": targets, **config}))
    randomised(net, seed=3, only="lora_")
    return randomised(net, seed=3, only="modules_to_save.")


def factors_of(net: Any) -> State:
    """The adapter's own tensors, under PEFT's keys."""
    return {key: value for key, value in get_peft_model_state_dict(net).items() if ".lora_" in key}


def loaded(source: Path | State, make: Callable[[], nn.Module] = conditional, scale: float | None = None) -> nn.Module:
    """A model into which diffusers loaded a file or a state dict as its pipelines do."""
    net: Any = make()
    given = source if isinstance(source, Path) else dict(source)
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        given, unet_config=net.config, return_lora_metadata=True
    )
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, net, adapter_name="g", metadata=metadata)
    if scale is not None:
        net.set_adapters("g", scale)
    return net.eval()


def read(source: Path | State, base: nn.Module, scale: float = 1.0) -> Weights:
    """What this library makes of it."""
    weights = open_file(source) if isinstance(source, Path) else from_mapping(source, "g")
    assert is_lora(weights)
    return converted(weights, shapes(base), scale)


def kohya(state: State, alpha: Callable[[str], float]) -> State:
    """diffusers' conversion, which knows no alpha but the rank, with an alpha for each module."""
    found = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in state.items()})
    return {k: torch.tensor(alpha(k)) if k.endswith(".alpha") else value for k, value in found.items()}


def old(state: State) -> State:
    """The keys of diffusers before 0.22, whose factors were in attention processors."""
    found = {}
    for key, value in state.items():
        for new, former in OLD.items():
            key = key.replace(new, former)
        found[key] = value
    return found


def test_adapters_that_diffusers_saved(tmp_path: Path) -> None:
    net = trained(EVERYWHERE, rank_pattern={"conv1": 2}, alpha_pattern={"to_k": 9}, modules_to_save=["conv_out"])
    net.save_lora_adapter(tmp_path)
    theirs: Any = conditional()
    theirs.load_lora_adapter(tmp_path, prefix=None, adapter_name="default", use_safetensors=True)
    base = conditional()
    bank = DeltaBank.load(base, {"g": tmp_path / "pytorch_lora_weights.safetensors"})
    check_weights(base, bank, theirs)
    check_forwards(base, bank, theirs)


@pytest.mark.parametrize(
    ("change", "targets", "stated", "scale"),
    [
        # The conversion knows attention only, and diffusers does not read what it makes of others beside it.
        (convert_state_dict_to_diffusers, ATTENTION, True, -0.5),
        (convert_state_dict_to_diffusers, ATTENTION, False, 1.0),
        (dict, EVERYWHERE, True, 1.0),
        (dict, EVERYWHERE, False, 0.3),
    ],
)
def test_files_of_pipelines(
    tmp_path: Path, change: Callable[[State], State], targets: list[str], stated: bool, scale: float
) -> None:
    net = trained(targets, use_rslora=True, rank_pattern={"to_k": 2})
    config = net.peft_config["default"].to_dict() if stated else None
    StableDiffusionPipeline.save_lora_weights(tmp_path, change(factors_of(net)), unet_lora_adapter_metadata=config)
    base = conditional()
    path = tmp_path / "pytorch_lora_weights.safetensors"
    bank = DeltaBank.load(base, {"g": Source(path, scale=scale)})
    assert bank.deltas[0].origin == (str(path) if scale == 1 else f"{path} (scale {scale:g})")
    check_weights(base, bank, loaded(path, scale=scale))


def test_files_of_transformers(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        )  # fmt: skip

    with torch.random.fork_rng():
        net = trained([*ATTENTION, "add_k_proj", "proj_out"], make)
        StableDiffusion3Pipeline.save_lora_weights(tmp_path, factors_of(net))
        path = tmp_path / "pytorch_lora_weights.safetensors"
        theirs: Any = make()
        theirs.load_lora_adapter(path, prefix="transformer")
        base = make()
    check_weights(base, DeltaBank.load(base, {"g": path}), theirs)


def test_files_before_peft(tmp_path: Path) -> None:
    state = old(factors_of(trained(ATTENTION)))
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight" in state
    theirs = loaded({f"unet.{key}": value for key, value in state.items()})
    base = conditional()
    torch.save(state, tmp_path / "pytorch_lora_weights.bin")
    for source in (tmp_path / "pytorch_lora_weights.bin", state, {f"unet.{k}": v for k, v in state.items()}):
        check_weights(base, DeltaBank.load(base, {"g": source}), theirs)


def test_files_of_kohya(tmp_path: Path) -> None:
    net = trained(EVERYWHERE, rank_pattern={"conv1": 2})
    state = kohya(factors_of(net), lambda key: 5.0 if "conv1" in key or "_ff_" in key else 3.0)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight" in state
    path = tmp_path / "style.safetensors"
    safetensors.torch.save_file(state, path, metadata={"ss_network_dim": "4", "ss_network_alpha": "3"})
    base, theirs = conditional(), loaded(path)
    bank = DeltaBank.load(base, {"g": path})
    check_weights(base, bank, theirs)
    check_forwards(base, bank, theirs)


def test_alphas_are_those_of_the_modules() -> None:
    """diffusers 0.42 gives attention layers the commonest alpha of the file; kohya's scripts give them their own."""
    net = trained(["to_q", "conv1"])
    state = kohya(factors_of(net), lambda key: 6.0 if "attn1_to_q" in key else 2.0)
    del state["lora_unet_mid_block_resnets_0_conv1.alpha"]
    base = conditional()
    factors = read(state, base).factors
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    up = state["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"]
    assert torch.equal(factors[f"{module}.weight"].read().up, up * (6 / 4))
    with pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match any targeted module"):
        assert loaded(state).get_submodule(module).scaling["g"] == 2 / 4
    # Without an alpha it is the rank, which makes no scale.
    up = state["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"]
    assert torch.equal(factors["mid_block.resnets.0.conv1.weight"].read().up, up[..., 0, 0])


# Of a UNet like SDXL's, in the names of Stable Diffusion's own code.
ORIGINAL = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_out_layers_3": "down_blocks.0.resnets.1.conv2",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_emb_layers_1": "down_blocks.1.resnets.0.time_emb_proj",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_5_1_transformer_blocks_1_attn1_to_q": "down_blocks.1.attentions.1.transformer_blocks.1.attn1.to_q",
    "middle_block_0_in_layers_2": "mid_block.resnets.0.conv1",
    "middle_block_1_transformer_blocks_0_attn2_to_k": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "middle_block_1_transformer_blocks_0_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_0_1_transformer_blocks_0_attn1_to_v": "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v",
    "output_blocks_2_1_transformer_blocks_1_attn2_to_out_0": (
        "up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_out.0"
    ),
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_3_0_skip_connection": "up_blocks.1.resnets.0.conv_shortcut",
    "output_blocks_5_0_out_layers_3": "up_blocks.1.resnets.2.conv2",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}


def like_sdxl() -> nn.Module:
    return conditional(
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )


def test_files_of_kohya_for_sdxl() -> None:
    base: Any = like_sdxl()
    random = torch.Generator().manual_seed(0)
    state: State = {}
    for original, module in ORIGINAL.items():
        out, *inner = base.get_submodule(module).weight.shape
        state[f"lora_unet_{original}.lora_down.weight"] = torch.randn(3, *inner, generator=random)
        state[f"lora_unet_{original}.lora_up.weight"] = torch.randn(out, 3, *(1 for _ in inner[1:]), generator=random)
        state[f"lora_unet_{original}.alpha"] = torch.tensor(2.0)
    theirs: Any = like_sdxl()
    found, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(state), unet_config=theirs.config)
    StableDiffusionXLPipeline.load_lora_into_unet(found, alphas, theirs)
    bank = DeltaBank.load(base, {"g": state})
    assert bank.survey("g").support == {f"{module}.weight": "low-rank" for module in ORIGINAL.values()}
    check_weights(base, bank, theirs.eval())


TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA_TO_Q = f"lora_unet_{TO_Q.replace('.', '_')}"


@pytest.fixture(scope="module")
def plain() -> State:
    """A LoRA of one layer with 16 inputs and outputs, rank 2."""
    return {f"unet.{TO_Q}.lora.down.weight": torch.ones(2, 16), f"unet.{TO_Q}.lora.up.weight": torch.ones(16, 2)}


@pytest.mark.parametrize(
    ("key", "found"),
    [
        (f"unet.{TO_Q}.lora_magnitude_vector", "DoRA"),
        (f"{KOHYA_TO_Q}.dora_scale", "DoRA"),
        (f"{KOHYA_TO_Q}.hada_w1_a", "LoHa"),
        (f"unet.{TO_Q}.lokr_w1", "LoKr"),
        (f"{KOHYA_TO_Q}.oft_blocks", "OFT"),
        (f"{KOHYA_TO_Q}.lora_mid.weight", "a LoRA with a third factor"),
    ],
)
def test_other_kinds_are_refused_by_name(plain: State, key: str, found: str) -> None:
    base = conditional()
    with pytest.raises(CheckpointError, match=f"^g: key '{key}' must belong to a LoRA of two factors, found {found}$"):
        read({**plain, key: torch.ones(2, 2)}, base)


@pytest.mark.parametrize(
    "key",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_text_encoders_are_refused_by_name(plain: State, key: str) -> None:
    alone = {key: torch.ones(2, 2), key.replace("layers.0", "layers.1").replace("rs_0", "rs_1"): torch.ones(2, 2)}
    for state in (alone, {**plain, **alone}):
        if key.startswith("base_model") and state is not alone:
            continue
        shown = key.removeprefix("base_model.model.")
        with pytest.raises(CheckpointError, match=f"^g: key '{shown}' belongs to a text encoder"):
            converted(from_mapping(state, "g"), shapes(conditional()))


NAN = torch.ones(16, 2)
NAN[3, 1] = float("nan")
DOWN, UP = f"unet.{TO_Q}.lora.down.weight", f"unet.{TO_Q}.lora.up.weight"
ELSEWHERE = "unet.down_blocks.7.attentions.0.to_q.lora.down.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {ELSEWHERE: torch.ones(2, 16)},
            f"'{ELSEWHERE}' is not in the base: it has no module 'down_blocks.7.attention",
        ),
        ({"unet.extra": torch.ones(1)}, "'unet.extra' is not in the base, and no LoRA's factor$"),
        ({DOWN: torch.ones(2, 24)}, rf"'{DOWN}' must have shape \(r, 16\) for .* \(16, 16\), found \(2, 24\)$"),
        ({DOWN: torch.ones(2, 16, 1, 1)}, rf"'{DOWN}' must have shape .* found \(2, 16, 1, 1\)$"),
        ({DOWN: torch.ones(3, 16)}, rf"'{UP}' must have shape \(16, 3\) for .* and rank 3 of '{DOWN}', found \(16, 2"),
        ({DOWN: torch.ones(0, 16)}, f"'{DOWN}' must have shape"),
        ({UP: torch.ones(16, 2, dtype=torch.int8)}, f"'{UP}' must hold floating values, found torch.int8$"),
        ({UP: torch.ones(16, 2).to_sparse()}, f"'{UP}' must be a dense tensor with values"),
        ({UP: None}, f"'{DOWN}' must come with the up factor of '{TO_Q}', found none$"),
        ({DOWN: None}, f"'{UP}' must come with the down factor of '{TO_Q}', found none$"),
        (
            {f"unet.{TO_Q}.lora_A.weight": torch.ones(2, 16)},
            "must be the only one for 'mid_block.*, found 'unet.*' too$",
        ),
        ({f"unet.{TO_Q}.alpha": torch.ones(2)}, r"alpha' must be one finite value, found nan of shape \(2,\)$"),
        ({f"unet.{TO_Q}.alpha": torch.tensor(float("inf"))}, r"alpha' must be one finite value, found inf of shape"),
        ({f"unet.{TO_Q}.lora.up.bias": torch.ones(16)}, f"must belong to a module with a bias, found '{TO_Q}' without"),
        ({"unet.conv_norm_out.lora.down.weight": torch.ones(2)}, "must come with the up factor of 'conv_norm_out'"),
    ],
)
def test_keys_that_do_not_fit_are_named(plain: State, change: dict[str, Tensor | None], message: str) -> None:
    state = {key: value for key, value in {**plain, **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=f"^g: key .*{message}"):
        read(state, conditional())


def test_values_are_checked_when_they_are_read(plain: State, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({**plain, UP: NAN}, path)
    weights = read(path, conditional())
    message = f"^{path}: key '{UP}' must be finite, found 1 NaN or infinite of 32 values, the first at \\(3, 1\\)"
    with pytest.raises(CheckpointError, match=message):
        weights.factors[f"{TO_Q}.weight"].read()


def test_norms_have_no_factors(plain: State) -> None:
    norm = {f"unet.conv_norm_out.lora.{which}.weight": torch.ones(8, 8) for which in ("down", "up")}
    with pytest.raises(CheckpointError, match=r"must belong to a weight of two dimensions or more, found shape \(8,\)"):
        read({**plain, **norm}, conditional())


def test_half_precision_is_multiplied_in_float32(plain: State) -> None:
    state = {key: torch.full_like(value, 0.1).half() for key, value in plain.items()}
    part = read({**state, f"unet.{TO_Q}.alpha": torch.tensor(0.3).half()}, conditional()).factors[f"{TO_Q}.weight"]
    found = part.read()
    assert found.up.dtype == found.down.dtype == torch.float32
    tenth, alpha = torch.tensor(0.1).half().float(), torch.tensor(0.3).half().float()
    assert torch.equal(found.up, torch.full((16, 2), (tenth * (alpha / 2)).item()))
    assert torch.equal(found.down, tenth.expand(2, 16))


def test_names_that_kohyas_rule_makes_equal() -> None:
    shapes = {"a_b.c.weight": (4, 4), "a.b_c.weight": (4, 4)}
    state = {f"lora_unet_a_b_c.lora_{which}.weight": torch.ones(4, 4) for which in ("down", "up")}
    with pytest.raises(CheckpointError, match="must belong to one module, found a.b_c and a_b.c in the base$"):
        converted(from_mapping(state, "g"), shapes)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "lora_adapter_metadata: cannot be read as JSON"),
        ("[]", "lora_adapter_metadata: must hold a JSON object, found list"),
        (json.dumps({"unet.r": 4, "unet.lora_alpha": 8}), f"key '{DOWN}' must have rank 4 as in .*metadata, found 2$"),
        (json.dumps({"unet.r": 2, "unet.lora_alpha": 8, "unet.use_dora": True}), "'use_dora' must be false"),
    ],
)
def test_headers_that_do_not_fit(plain: State, tmp_path: Path, metadata: str, message: str) -> None:
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file(plain, path, metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(CheckpointError, match=f"^{path}: .*{message}"):
        read(path, conditional())


def test_the_scale_is_said_once(plain: State, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    text = json.dumps({"r": 2, "lora_alpha": 8})
    alpha = f"unet.{TO_Q}.alpha"
    safetensors.torch.save_file({**plain, alpha: torch.tensor(1.0)}, path, metadata={"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match=f"'{alpha}' must be absent, because .*metadata says the scale too"):
        read(path, conditional())


def test_whole_parameters_have_no_scale(plain: State) -> None:
    state = {**plain, "unet.conv_in.bias": torch.ones(8)}
    assert read(state, conditional()).entries.keys() == {"conv_in.bias"}
    with pytest.raises(CheckpointError, match="^g: the scale must be 1 where .* such as 'conv_in.bias', found -2"):
        read(state, conditional(), scale=-2.0)


def test_models_are_no_loras() -> None:
    assert not is_lora(from_mapping(conditional().state_dict(), "g"))
    assert not is_lora(from_mapping({"model.alpha": torch.ones(1)}, "g"))


def test_ten_thousand_keys_take_under_a_second() -> None:
    state = {f"lora_unet_a_{i}.lora_{which}.weight": torch.ones(1, 1) for i in range(5000) for which in ("down", "up")}
    names = {f"a.{i}.weight": (1, 1) for i in range(5000)}
    start = time.perf_counter()
    weights = converted(from_mapping(state, "g"), names)
    assert len(weights.factors) == 5000 and time.perf_counter() - start < 1
