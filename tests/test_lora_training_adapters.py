"""What is written of a run is an adapter that PEFT and the bank read alike."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from adapter_cases import EPSILON, check_forwards, check_weights, conditional, unet
from guda_fast.counterfactuals.config import TrainConfig
from guda_fast.counterfactuals.lora import LoraStudents, save_adapter
from guda_fast.deltas import DeltaBank

CASES = {
    "unconditional": (unet, "all"),
    "prompts": (conditional, "all"),
    "keys and values": (conditional, "cross-attention-kv"),
    # In a list "conv1" would be the end of other names, too.
    "one layer": (unet, ("mid_block.resnets.0.conv1.weight",)),
}


def students_of(base: nn.Module, patterns: str | tuple[str, ...], config: TrainConfig) -> LoraStudents:
    """A run whose factors are far from their beginning."""
    alpha = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    assert config.lora_rank is not None and alpha is not None
    students = LoraStudents(base, ["run"], rank=config.lora_rank, alpha=alpha, patterns=patterns)
    random = torch.Generator().manual_seed(0)
    for parameter in students.parameters("run"):
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return students


@pytest.mark.parametrize(("case", "alpha"), [*((case, 3.0) for case in CASES), ("one layer", None)])
def test_peft_and_the_bank_read_what_was_trained(tmp_path: Path, case: str, alpha: float | None) -> None:
    make, patterns = CASES[case]
    base, config = make(), TrainConfig(1, lora_rank=4, lora_alpha=alpha)
    students = students_of(base, patterns, config)
    save_adapter(students.factors("run"), config, tmp_path)
    injected = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).get_base_model()
    bank = DeltaBank.load(base, {"g": tmp_path})
    check_weights(base, bank, injected)
    check_forwards(base, bank, injected)
    ours = students.model("run").state_dict()
    deltas = bank.deltas[0].parts
    assert deltas.keys() == {f"{name}.weight" for name in students.factors("run")}
    with bank.applied("g") as model:
        for name, value in model.state_dict().items():
            delta = (ours[name] - base.state_dict()[name]).abs().max()
            # The same factors: a product of so many terms, scaled before or after it, and one sum.
            bound = EPSILON * (8 * config.lora_rank * delta + 2 * ours[name].abs()) if name in deltas else 0
            assert bool(((value - ours[name]).abs() <= bound).all()), name


def test_a_folder_keeps_its_other_files_and_an_older_adapter_is_replaced(tmp_path: Path) -> None:
    folder, config = tmp_path / "new" / "run", TrainConfig(1, lora_rank=1)
    students = students_of(unet(), ("conv_in.*",), config)
    save_adapter(students.factors("run"), config, folder)
    (folder / "log.jsonl").write_text("{}\n")
    before = (folder / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        students.parameters("run")[0].add_(1)
    save_adapter(students.factors("run"), config, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() != before
    names = {"adapter_config.json", "adapter_model.safetensors", "log.jsonl"}
    assert {path.name for path in folder.iterdir()} == names
    found = json.loads((folder / "adapter_config.json").read_text())
    assert (found["r"], found["lora_alpha"], found["target_modules"]) == (1, 1, "conv_in")
