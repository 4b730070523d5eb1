"""Readers of checkpoints on random damage: a model or a CheckpointError, and nothing else, in bounded time."""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bounds import allowed_seconds
from guda_fast.deltas import Source
from guda_fast.deltas.base import open_base
from guda_fast.deltas.groups import open_group
from guda_fast.deltas.resident import ResidentModel
from guda_fast.errors import CheckpointError
from ldm import UNET, original, tiny_conditional_unet
from tiny import perturbed

pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow

BASE = tiny_conditional_unet()
OPENED = open_base(BASE, None)
RESIDENT = ResidentModel(OPENED.model, "base")
OTHER = perturbed(BASE)
STATE = dict(OTHER.state_dict())
PART = {name: tensor for name, tensor in STATE.items() if "attn2.to_k" in name}
# Examples by test, so that all of them together take a minute.
FUZZ = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
LAYER = next(iter(PART)).removesuffix(".weight")
OUT, IN = PART[f"{LAYER}.weight"].shape


def saved(content: object, *, zipped: bool = True) -> bytes:
    torch.save(content, buffer := io.BytesIO(), _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


FILES: dict[str, bytes] = {
    "safetensors": safetensors.torch.save(PART),
    "zip": saved({"unet": PART, "step": 3}),
    "old": saved({"state_dict": PART}, zipped=False),
    "shadows": saved({"decay": 0.9, "shadow_params": list(OTHER.parameters())}, zipped=False),
    "original": safetensors.torch.save(original(PART)),
    "lora": safetensors.torch.save(
        {f"unet.{LAYER}.lora_A.weight": torch.ones(2, IN), f"unet.{LAYER}.lora_B.weight": torch.ones(OUT, 2)}
    ),
}


def opens(source: object) -> bool:
    """Whether the source opens and its values can be read, or else is refused; within two seconds either way."""
    start, read = time.process_time(), False
    with suppress(CheckpointError):
        for _ in open_group(source, "g", OPENED, RESIDENT).parts():  # type: ignore[arg-type]
            pass
        read = True
    seconds = time.process_time() - start
    assert seconds < 2 or seconds < allowed_seconds()
    return read


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Some bytes replaced, a piece cut out or doubled, or the end lost."""
    # What is parsed is at the start or, of archives, at the end: most damage goes there.
    spots = st.one_of(
        st.integers(0, min(2000, len(content) - 1)),
        st.integers(max(0, len(content) - 2000), len(content) - 1),
        st.integers(0, len(content) - 1),
    )
    changed = bytearray(content)
    for spot in data.draw(st.lists(spots, max_size=6)):
        changed[spot] = data.draw(st.integers(0, 255))
    start, size = data.draw(spots), data.draw(st.integers(0, 40))
    match data.draw(st.sampled_from(["keep", "keep", "cut", "double", "end"])):
        case "cut":
            del changed[start : start + size]
        case "double":
            changed[start:start] = changed[start : start + size]
        case "end":
            del changed[start:]
    return bytes(changed)


def write(folder: str, name: str, content: bytes) -> Path:
    path = Path(folder) / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("form", FILES)
def test_damaged_bytes(form: str) -> None:
    with tempfile.TemporaryDirectory() as folder:

        @settings(FUZZ, max_examples=600)
        @given(st.data(), st.sampled_from(["model.safetensors", "model.pt"]))
        def fuzz(data: st.DataObject, name: str) -> None:
            opens(write(folder, name, damaged(data, FILES[form])))

        assert opens(write(folder, "model.pt", FILES[form]))
        fuzz()


ATOMS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.integers(-2, 9)
)
VALUES = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner))


def replaced(data: st.DataObject, content: Any) -> Any:
    """The JSON value with one of its parts, at any depth, replaced by something else."""
    if isinstance(content, dict) and content and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(sorted(content)))
        return {**content, key: replaced(data, content[key])}
    if isinstance(content, list) and content and data.draw(st.integers(0, 9)):
        at = data.draw(st.integers(0, len(content) - 1))
        return [*content[:at], replaced(data, content[at]), *content[at + 1 :]]
    return data.draw(VALUES)


@settings(FUZZ, max_examples=600)
@given(st.data(), st.sampled_from(["safetensors", "original", "lora"]))
def test_safetensors_headers_with_other_values(data: st.DataObject, form: str) -> None:
    content = FILES[form]
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(replaced(data, json.loads(content[8:start]))).encode()
    with tempfile.TemporaryDirectory() as folder:
        opens(write(folder, "model.safetensors", len(header).to_bytes(8, "little") + header + content[start:]))


def diffusers_folder(folder: Path) -> str:
    OTHER.save_pretrained(folder)
    return "config.json"


def sharded_folder(folder: Path) -> str:
    OTHER.save_pretrained(folder, max_shard_size="40KB")
    return "diffusion_pytorch_model.safetensors.index.json"


def adapter_folder(folder: Path) -> str:
    import peft

    config = peft.LoraConfig(target_modules=["to_q", "conv1"], rank_pattern={"mid_block.*to_q": 3}, r=2)
    peft.get_peft_model(perturbed(BASE, 0.0), config).save_pretrained(folder)
    return "adapter_config.json"


@pytest.mark.filterwarnings("ignore:.*regular expression:FutureWarning")
@pytest.mark.parametrize("made", [diffusers_folder, sharded_folder, adapter_folder])
def test_settings_with_other_values(made: Callable[[Path], str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / made(Path(folder))
        content = json.loads(path.read_text())

        @settings(FUZZ, max_examples=300)
        @given(st.data())
        def fuzz(data: st.DataObject) -> None:
            path.write_text(json.dumps(replaced(data, content)))
            opens(folder)

        assert opens(folder)
        fuzz()


PIECES = st.sampled_from(
    [
        "", ".", UNET, "unet.", "module.", "model_ema.", "shadow_params.", "lora_unet_", "lora_te_",
        "base_model.model.",
        LAYER, LAYER.replace(".", "_"), ".weight", ".bias", ".alpha", ".lora_A.weight", ".lora_B.weight",
        ".lora_down.weight", ".lora_up.weight", ".lora_A", ".dora_scale", ".hada_w1_a",
        ".processor.to_q_lora.up.weight",
        "input_blocks.", "output_blocks.1", "middle_block.1", "0.0", "cond_stage_model.", "first_stage_model.", "embed",
        "modules_to_save.", "conv_in", "text_encoder.", "\0", "../", "%s",
    ]
)  # fmt: skip
KEYS = st.lists(PIECES | st.text(max_size=3), min_size=1, max_size=5).map("".join)
SHAPES = st.sampled_from([(), (0,), (1,), (2, IN), (OUT, 2), (OUT, IN), (IN, OUT), (2, 0), (8,), (2, 4, 3, 3), (OUT,)])
TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape).to(dtype),
    SHAPES,
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
)
THINGS = TENSORS | ATOMS | st.lists(TENSORS, max_size=3) | st.dictionaries(KEYS, TENSORS, max_size=3)
STATES = st.dictionaries(KEYS | st.sampled_from(["unet", "state_dict", "shadow_params", 3]), THINGS, max_size=6)
CHOICES = st.fixed_dictionaries(
    {
        "format": st.sampled_from([None, None, "state_dict", "partial", "lora", "ema", "compvis", "peft", "diffusers"]),
        "weights": st.sampled_from(["raw", "raw", "ema"]),
        "scale": st.sampled_from([1, 1, -0.5, 0]),
    }
)


@settings(FUZZ, max_examples=3000)
@given(STATES, CHOICES)
def test_state_dicts_with_any_keys(state: dict[Any, Any], choices: dict[str, Any]) -> None:
    opens(Source(state, **choices))
