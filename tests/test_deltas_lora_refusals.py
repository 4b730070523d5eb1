"""LoRA files that cannot be read, or not in part: each is refused with the key that says why."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from adapter_cases import State, conditional, read_lora, shapes
from bounds import allowed_seconds
from guda_fast.deltas.formats.lora import converted, is_lora
from guda_fast.deltas.formats.state_dict import from_mapping
from guda_fast.errors import CheckpointError

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
        read_lora({**plain, key: torch.ones(2, 2)}, base)


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
        read_lora(state, conditional())


def test_values_are_checked_when_they_are_read(plain: State, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({**plain, UP: NAN}, path)
    weights = read_lora(path, conditional())
    message = f"^{path}: key '{UP}' must be finite, found 1 NaN or infinite of 32 values, the first at \\(3, 1\\)"
    with pytest.raises(CheckpointError, match=message):
        weights.factors[f"{TO_Q}.weight"].read()


def test_factors_of_an_embedding_belong_to_one(plain: State) -> None:
    for module, message in (("conv_norm_out", "two dimensions or more"), ("conv_in", "shape"), (TO_Q, "shape")):
        pair = {
            f"unet.{module}.lora_embedding_A": torch.ones(2, 8),
            f"unet.{module}.lora_embedding_B": torch.ones(3, 2),
        }
        with pytest.raises(CheckpointError, match=f"^g: key 'unet.{module}.lora_embedding_A' must .*{message}"):
            read_lora({**pair, f"unet.{module}.lora_B.bias": torch.ones(3)}, conditional())
    with pytest.raises(CheckpointError, match=f"embedding_A' must be the only one for '{TO_Q}', found '{DOWN}' too"):
        read_lora({**plain, f"unet.{TO_Q}.lora_embedding_A": torch.ones(2, 16)}, conditional())


def test_norms_have_no_factors(plain: State) -> None:
    norm = {f"unet.conv_norm_out.lora.{which}.weight": torch.ones(8, 8) for which in ("down", "up")}
    with pytest.raises(CheckpointError, match=r"must belong to a weight of two dimensions or more, found shape \(8,\)"):
        read_lora({**plain, **norm}, conditional())


def test_half_precision_is_multiplied_in_float32(plain: State) -> None:
    state = {key: torch.full_like(value, 0.1).half() for key, value in plain.items()}
    part = read_lora({**state, f"unet.{TO_Q}.alpha": torch.tensor(0.3).half()}, conditional()).factors[f"{TO_Q}.weight"]
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
        read_lora(path, conditional())


def test_the_scale_is_said_once(plain: State, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    text = json.dumps({"r": 2, "lora_alpha": 8})
    alpha = f"unet.{TO_Q}.alpha"
    safetensors.torch.save_file({**plain, alpha: torch.tensor(1.0)}, path, metadata={"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match=f"'{alpha}' must be absent, because .*metadata says the scale too"):
        read_lora(path, conditional())


def test_whole_parameters_have_no_scale(plain: State) -> None:
    state = {**plain, "unet.conv_in.bias": torch.ones(8)}
    assert read_lora(state, conditional()).entries.keys() == {"conv_in.bias"}
    with pytest.raises(CheckpointError, match="^g: the scale must be 1 where .* such as 'conv_in.bias', found -2"):
        read_lora(state, conditional(), scale=-2.0)


def test_models_are_no_loras() -> None:
    assert not is_lora(from_mapping(conditional().state_dict(), "g"))
    assert not is_lora(from_mapping({"model.alpha": torch.ones(1)}, "g"))


def test_ten_thousand_keys_take_under_a_second() -> None:
    state = {f"lora_unet_a_{i}.lora_{which}.weight": torch.ones(1, 1) for i in range(5000) for which in ("down", "up")}
    names = {f"a.{i}.weight": (1, 1) for i in range(5000)}
    start = time.process_time()  # not of what else the machine does
    weights = converted(from_mapping(state, "g"), names)
    seconds = time.process_time() - start
    assert len(weights.factors) == 5000 and seconds < allowed_seconds()
