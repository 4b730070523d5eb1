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
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.warning import PeftWarning
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapter_cases import (
    CLASSES,
    EPSILON,
    check_batched,
    check_forwards,
    check_weights,
    conditional,
    merged,
    randomised,
    shapes,
    unet,
)
from guda_fast.deltas import DeltaBank, Source
from guda_fast.deltas.formats.peft import is_adapter, open_adapter
from guda_fast.errors import CheckpointError
from guda_fast.forward._batched_layers import StackedLayer

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
    bank = DeltaBank.load(base, {"g": tmp_path})
    check_weights(base, bank, injected.get_base_model())
    check_forwards(base, bank, injected.get_base_model())


def test_rows_of_low_rank_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the delta ops, as on a GPU, where factors are not merged."""
    takes = StackedLayer.takes
    monkeypatch.setattr(StackedLayer, "takes", lambda module, forms, _: takes(module, forms, torch.device("cuda")))
    make, config = CONFIGS["patterns"]
    injected = adapter(make(), config)
    injected.save_pretrained(tmp_path)
    base = make()
    check_batched(base, DeltaBank.load(base, {"g": tmp_path}), injected.get_base_model())


def test_the_scale_is_that_of_peft(tmp_path: Path) -> None:
    make, config = CONFIGS["rslora"]
    injected = adapter(make(), config)
    injected.save_pretrained(tmp_path)
    for module in injected.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_scale("default", -0.3)
    base = make()
    bank = DeltaBank.load(base, {"g": Source(tmp_path, scale=-0.3)})
    assert bank.deltas[0].origin.endswith("adapter_model.safetensors (scale -0.3)")
    check_weights(base, bank, injected.get_base_model())


def test_transposition_that_linear_layers_do_not_have(tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 3, "target_modules": ["to_q"], "fan_in_fan_out": True}
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        injected = adapter(unet(), config)
    injected.save_pretrained(tmp_path)
    base = unet()
    check_weights(base, DeltaBank.load(base, {"g": tmp_path}), injected.get_base_model())


def saved(folder: Path, config: dict[str, Any], state: dict[str, Tensor] | None = None) -> None:
    """An adapter folder, with values of one layer unless others are given."""
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(PLAIN if state is None else state, folder / "adapter_model.safetensors")


TO_Q = "mid_block.attentions.0.to_q"
PREFIX = "base_model.model."
PLAIN = {f"{PREFIX}{TO_Q}.lora_A.weight": torch.ones(2, 16), f"{PREFIX}{TO_Q}.lora_B.weight": torch.ones(16, 2)}
GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["to_q"]}


@pytest.mark.parametrize("kind", ["DoRA", "LoHa", "LoKr", "PiSSA"])
def test_other_adapters_of_peft_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    make: dict[str, Any] = {
        "DoRA": LoraConfig(r=2, target_modules=["to_q"], use_dora=True),
        "LoHa": peft.LoHaConfig(r=2, target_modules=["to_q"]),
        "LoKr": peft.LoKrConfig(r=2, target_modules=["to_q"]),
        "PiSSA": LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa"),
    }
    get_peft_model(unet(), make[kind]).save_pretrained(tmp_path)
    message = {
        "DoRA": "key 'use_dora' must be false, because DoRA is not supported, found true",
        "LoHa": "key 'peft_type' must be 'LORA', found 'LOHA'",
        "LoKr": "key 'peft_type' must be 'LORA', found 'LOKR'",
        "PiSSA": "key 'init_lora_weights' must be one that leaves the base as it is, found 'pissa'; save_pretrained",
    }
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/adapter_config.json: {message[kind]}"):
        open_adapter(tmp_path, shapes(unet()))


def test_pissa_as_peft_converts_it(tmp_path: Path) -> None:
    config: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": ["to_q"], "init_lora_weights": "pissa"}
    base, injected = unet(), get_peft_model(unet(), LoraConfig(**config))
    first, trained = tmp_path / "first", tmp_path / "trained"
    injected.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it, before the first save
    injected.save_pretrained(first)
    randomised(injected, seed=3, only="lora_")
    injected.save_pretrained(trained, path_initial_model_for_weight_conversion=str(first))
    bank = DeltaBank.load(base, {"g": trained})
    theirs = merged(injected.get_base_model())
    for name, part in bank.deltas[0].parts.items():
        weight = base.get_parameter(name).detach()
        expected = theirs.get_parameter(name.replace("to_q.", "to_q.base_layer.")) - weight
        # Both subtract the base's principal part in float32, so that its rounding stays.
        assert float((part.full(weight.shape) - expected).abs().max()) <= 16 * EPSILON * float(weight.abs().max())
    assert len(bank.deltas[0].parts) == 4


def test_grouped_convolutions_are_refused_by_name(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, groups=2)

    with pytest.warns(UserWarning, match="groups > 1. Merging is not supported"):
        injected = get_peft_model(Net(), LoraConfig(r=2, target_modules=["conv"]))
    injected.save_pretrained(tmp_path)
    message = r"conv.lora_A.weight' must have shape \(r, 2, 3, 3\) .* found \(2, 4, 3, 3\): the LoRA of a grouped conv"
    with pytest.raises(CheckpointError, match=message):
        open_adapter(tmp_path, shapes(Net()))


def test_weights_of_inputs_by_outputs(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.square = Conv1D(6, 4), Conv1D(5, 5)

    base, injected = (
        Net(),
        get_peft_model(Net(), LoraConfig(r=2, target_modules=["wide", "square"], fan_in_fan_out=True)),
    )
    injected.get_base_model().wide.base_layer.weight.data.copy_(base.wide.weight)
    injected.get_base_model().square.base_layer.weight.data.copy_(base.square.weight)
    randomised(injected, seed=3, only="lora_").save_pretrained(tmp_path)
    bank = DeltaBank.load(base, {"g": tmp_path})
    check_weights(base, bank, injected.get_base_model())


@pytest.mark.parametrize("safe", [True, False])
def test_files_in_half_precision(tmp_path: Path, safe: bool) -> None:
    config = {"r": 4, "lora_alpha": 3, "target_modules": ["to_q", "conv1"]}
    injected = adapter(unet(), config)
    for name, parameter in injected.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()
    injected.save_pretrained(tmp_path, safe_serialization=safe)
    base = unet()
    bank = DeltaBank.load(base, {"g": tmp_path})
    check_weights(base, bank, injected.get_base_model())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "key 'r' must be a whole number from 1 on, found 0"),
        ({"r": True}, "key 'r' must be a whole number from 1 on, found True"),
        ({"r": None}, "key 'r' must be a whole number from 1 on, found None"),
        ({"lora_alpha": "8"}, "key 'lora_alpha' must be a finite number, found '8'"),
        ({"lora_alpha": float("nan")}, "key 'lora_alpha' must be a finite number, found nan"),
        ({"rank_pattern": ["to_q"]}, r"key 'rank_pattern' must be an object, found \['to_q'\]"),
        ({"rank_pattern": {"to_q": 2.5}}, "key 'rank_pattern' must be a whole number from 1 on, found 2.5"),
        (
            {"alpha_pattern": {"to_(q": 2}},
            r"key 'alpha_pattern' must have regular expressions, found 'to_\(q': missing",
        ),
        ({"alpha_pattern": {"(a+)+b": 2}}, "key 'alpha_pattern' must have patterns with three repetitions at most"),
        ({"lora_alpha": 10**400}, "key 'lora_alpha' must be a finite number, found 1000"),
        ({"alpha_pattern": {".*.*.*.*b": 2}}, "key 'alpha_pattern' must have patterns with three repetitions at most"),
        ({"layer_replication": [[0, 4], [2, 5]]}, r"key 'layer_replication' must be absent or off, .* \[\[0, 4\], "),
        ({"use_qalora": True}, "key 'use_qalora' must be absent or off, because this variant of LoRA is not supp"),
        ({"use_something_new": 1}, "key 'use_something_new' must be absent or off"),
    ],
)
def test_configurations_that_cannot_be_read(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    saved(tmp_path, {**GOOD, **changes})
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/adapter_config.json: {message}"):
        open_adapter(tmp_path, shapes(unet()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, "must have rank 4 as in .*adapter_config.json, found 2$"),
        ({"rank_pattern": {"to_.": 3}}, "must have rank 3 as in .*adapter_config.json, found 2$"),
    ],
)
def test_ranks_are_those_of_the_configuration(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    saved(tmp_path, {**GOOD, **changes})
    with pytest.raises(
        CheckpointError, match=f"adapter_model.safetensors: key '{PREFIX}{TO_Q}.lora_A.weight' {message}"
    ):
        open_adapter(tmp_path, shapes(unet()))


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    adapter(conditional(), {"r": 2, "target_modules": ["to_q"]}).save_pretrained(tmp_path)
    message = r"adapter_model.safetensors: key 'base_model.model.down_blocks.0.att.*lora_A.weight' is not in the base"
    with pytest.raises(CheckpointError, match=message):
        open_adapter(tmp_path, shapes(unet()))


def test_folders_that_lack_a_file(tmp_path: Path) -> None:
    assert not is_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(GOOD))
    assert is_adapter(tmp_path)
    message = f"^{tmp_path}: no weights: no adapter_model.safetensors or adapter_model.bin$"
    with pytest.raises(CheckpointError, match=message):
        open_adapter(tmp_path, shapes(unet()))


def test_biases_given_and_changed(tmp_path: Path) -> None:
    conv = f"{PREFIX}conv_in"
    state = {f"{conv}.lora_A.weight": torch.ones(2, 3, 3, 3), f"{conv}.lora_B.weight": torch.ones(8, 2, 1, 1)}
    state |= {f"{conv}.lora_B.bias": torch.ones(8), f"{conv}.base_layer.bias": torch.ones(8)}
    saved(tmp_path, GOOD, state)
    base = unet()
    with pytest.raises(CheckpointError, match="conv_in.lora_B.bias' must be all that is given for 'conv_in.bias'"):
        DeltaBank.load(base, {"g": tmp_path})


def test_factors_are_read_when_asked_for(tmp_path: Path) -> None:
    saved(tmp_path, GOOD)
    weights = open_adapter(tmp_path, shapes(unet()), scale=-2.0)
    assert weights.origin == f"{tmp_path}/adapter_model.safetensors (scale -2)"
    assert {path.name for path in weights.files} == {"adapter_model.safetensors", "adapter_config.json"}
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])  # the file's tail is gone, which only a reader of values can notice
    part = weights.factors[f"{TO_Q}.weight"]
    with pytest.raises(CheckpointError, match="cannot be read: the file was cut off"):
        part.read()


class Holder(nn.Module):
    """A module that holds its network under a name that is also a wrapper's."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = unet()


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize("pattern", [r"^unet\.mid_block\..*to_q", r"^mid_block\..*to_q", "to_q"])
@pytest.mark.parametrize("base", [Holder, unet])
def test_patterns_are_for_the_names_in_the_file(tmp_path: Path, base: Callable[[], nn.Module], pattern: str) -> None:
    """Also where the base has the network without its holder: PEFT matched the holder's names."""
    config = {"r": 4, "lora_alpha": 3, "target_modules": ["to_q", "to_k"], "alpha_pattern": {pattern: 40}}
    injected = adapter(Holder(), config)
    injected.save_pretrained(tmp_path)
    model = base()
    bank = DeltaBank.load(model, {"g": tmp_path})
    theirs = injected.get_base_model() if base is Holder else injected.get_base_model().unet
    check_weights(model, bank, theirs)


def test_layers_of_a_holder_that_are_the_networks_too(tmp_path: Path) -> None:
    """A base with ``unet.conv`` and ``conv``: the adapter of the one is not the other's."""

    def both() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"unet": nn.ModuleDict({"conv": nn.Linear(4, 4)}), "conv": nn.Linear(4, 4)})

    injected = adapter(both(), {"r": 2, "target_modules": r"unet\.conv"})
    injected.save_pretrained(tmp_path)
    base = both()
    bank = DeltaBank.load(base, {"g": tmp_path})
    assert bank.survey("g").support == {"unet.conv.weight": "low-rank"}
    check_weights(base, bank, injected.get_base_model())
