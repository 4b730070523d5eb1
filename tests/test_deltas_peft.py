"""PEFT adapter folders: what PEFT saved, read, and as PEFT itself computes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.warning import PeftWarning
from torch import Tensor, nn

from adapter_cases import CLASSES, bank_of, check_forwards, check_weights, conditional, randomised, shapes, unet
from guda_fast.deltas.delta import LowRank
from guda_fast.deltas.formats.peft import is_adapter, open_adapter
from guda_fast.deltas.weights import named_tensors
from guda_fast.errors import CheckpointError

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv_in", "conv_shortcut", "downsamplers.0.conv"]
# Each with an alpha that is not the rank, so that a scale of one would show.
CONFIGS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "patterns": (
        unet,
        {
            "r": 4,
            "lora_alpha": 3,
            "target_modules": [*ATTENTION, *CONVOLUTIONS],
            "rank_pattern": {"to_q": 2, "^conv_in": 5, r"down_blocks\.\d\..*conv1": 6},
            "alpha_pattern": {"to_k": 16, "mid_block.attentions.0.to_q": 7},
        },
    ),
    "rslora": (
        unet,
        {"r": 4, "lora_alpha": 3, "target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"to_v": 9}},
    ),
    "all biases and modules_to_save": (
        unet,
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["to_q", "conv1"],
            "bias": "all",
            "modules_to_save": ["conv_out", "conv_norm_out"],
        },
    ),
    "biases of targets": (unet, {"r": 2, "lora_alpha": 3, "target_modules": ["to_q", "conv1"], "bias": "lora_only"}),
    "bias of the up factor": (
        unet,
        {"r": 2, "lora_alpha": 3, "target_modules": ["to_q", "conv1"], "lora_bias": True},
    ),
    "embedding": (
        lambda: unet(num_class_embeds=CLASSES),
        {"r": 2, "lora_alpha": 3, "target_modules": ["class_embedding", "to_q"]},
    ),
    "conditional": (
        conditional,
        {"r": 4, "lora_alpha": 3, "target_modules": [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]},
    ),
}


def adapter(model: nn.Module, config: dict[str, Any]) -> peft.PeftModel:
    """A PEFT model whose adapter was trained for long, as far as its values go."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        injected = get_peft_model(model, LoraConfig(**config))
    for part in ("lora_", "modules_to_save."):
        randomised(injected, seed=3, only=part)
    if config.get("bias", "none") != "none":
        for name, parameter in injected.named_parameters():
            if parameter.requires_grad and name.endswith(".bias"):
                with torch.no_grad():
                    parameter.add_(0.25)
    return injected


@pytest.mark.parametrize("case", CONFIGS)
def test_peft_adapters_compute_what_peft_computes(tmp_path: Path, case: str) -> None:
    make, config = CONFIGS[case]
    injected = adapter(make(), config)
    # PEFT takes the bias of an up factor for a shard, and writes it all the same.
    warned = pytest.warns(PeftWarning, match="invalid shape") if "lora_bias" in config else nullcontext()
    with warned:
        injected.save_pretrained(tmp_path)
    assert is_adapter(tmp_path)
    base = make()
    weights = open_adapter(tmp_path, shapes(base))
    assert weights.origin == str(tmp_path / "adapter_model.safetensors")
    assert {path.name for path in weights.files} == {"adapter_model.safetensors", "adapter_config.json"}
    bank = bank_of(base, weights)
    check_weights(base, bank, injected.get_base_model())
    check_forwards(base, bank, injected.get_base_model())
