"""Every block of docs/checkpoints.md runs on files that the tools' own libraries, or their way of saving, made."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from conditional import IMAGE, prompted, save_pipeline
from guda_fast.cli import main
from guda_fast.deltas import DeltaBank
from ldm import original
from tiny import perturbed, tiny_unet

pytest.importorskip("diffusers")
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.training_utils import EMAModel

PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"
State = dict[str, torch.Tensor]
SD = prompted()
NETWORK = (
    "from torch.nn import Linear\n\nclass Network(Linear):\n    def __init__(self):\n        super().__init__(2, 2)\n"
)


def sections() -> dict[str, list[tuple[str, str]]]:
    """The (language, code) blocks of each section of the page."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    blocks = (re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL) for text in parts[2::2])
    return dict(zip(parts[1::2], blocks, strict=True))


def trained(seed: int, *layers: str) -> State:
    """The parameters of a trained copy of the Stable Diffusion UNet whose names hold one of ``layers``."""
    state = perturbed(SD, seed=seed).state_dict()
    return {name: tensor for name, tensor in state.items() if not layers or any(layer in name for layer in layers)}


def full_model() -> nn.Module:
    """full/, a pipeline, and queries/."""
    base = tiny_unet()
    DDPMPipeline(base, DDPMScheduler(num_train_timesteps=100)).save_pretrained("full")
    images()
    return base


def stable_diffusion_model(folder: str = "sd", unet: nn.Module = SD, queries: str = "queries") -> nn.Module:
    """A pipeline, images and prompts.jsonl."""
    save_pipeline(Path(folder), unet)
    images(queries, (IMAGE, IMAGE, 3))
    Path("prompts.jsonl").write_text('{"file_name": "0.png", "prompt": "a cat"}\n')
    return unet


def images(folder: str = "queries", shape: tuple[int, ...] = (8, 8)) -> None:
    Path(folder).mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(f"{folder}/0.png")


def diffusers_scripts() -> None:
    base = full_model()
    perturbed(base).save_pretrained("unlearn_cat", max_shard_size="20KB")
    for variant in (None, "fp16"):
        perturbed(base, seed=2).save_pretrained("unlearn_dog/checkpoint-500/unet", variant=variant)


def guda_scripts() -> None:
    base = tiny_unet()
    for seed, folder in enumerate(("full", "unlearn_class_3/latest", "unlearn_class_5/latest")):
        perturbed(base, seed=seed).save_pretrained(f"cifar/{folder}")
        DDPMScheduler(num_train_timesteps=100).save_pretrained(f"cifar/{folder}")
        torch.save({"epoch": 7}, f"cifar/{folder}/training_state.pt")
    images()
    stable_diffusion_model(queries="paintings")
    for seed, style in enumerate(("Van Gogh", "Pop Art"), 1):
        Path("canvas", style).mkdir(parents=True)
        content = {
            "unet_state_dict": trained(seed),
            "optimizer_state_dict": {"state": {}},
            "step": 500,
            "args": {"lr": 1},
        }
        torch.save(content, f"canvas/{style}/checkpoint_step_500.pt")


def averages() -> None:
    base = full_model()
    for seed, group in enumerate(("cat", "dog"), 1):
        other = perturbed(base, seed=seed)
        average = EMAModel(base.parameters(), model_cls=type(base), model_config=base.config)
        for model in (other, base, other):
            average.step(model.parameters())
        if group == "cat":
            other.save_pretrained("unlearn_cat")
            torch.save(average.state_dict(), "unlearn_cat/ema_model.pt")
        else:
            other.save_pretrained("unlearn_dog/unet")
            average.save_pretrained("unlearn_dog/unet_ema")


def esd() -> None:
    rounded = stable_diffusion_model("sd-bfloat16", prompted().to(torch.bfloat16))
    layers = [n for n, m in SD.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    state = {name: tensor.bfloat16() for name, tensor in trained(1).items() if name.rpartition(".")[0] in layers}
    assert sum("attn2" not in name for name in state) > len(SD.state_dict()) / 2
    save_file({n: t for n, t in state.items() if "attn2" in n}, "esd-Van_Gogh-from-Van_Gogh-esdx.safetensors")
    save_file({n: t for n, t in state.items() if "attn2" not in n}, "esd-Pop_Art-from-Pop_Art-esdu.safetensors")
    torch.save({**rounded.state_dict(), **trained(2, "attn2")}, "diffusers-word_Cubism-method_xattn.pt")


def uce() -> None:
    stable_diffusion_model()
    Path("uce_models").mkdir()
    save_file(trained(1, "attn2.to_k", "attn2.to_v"), "uce_models/van_gogh.safetensors")


def concept_ablation() -> None:
    stable_diffusion_model()
    torch.save({"unet": trained(1, "attn2.to_k", "attn2.to_v")}, "delta.bin")
    torch.save({"state_dict": original(trained(2, "attn2.to_k", "attn2.to_v"))}, "delta_epoch=000007.ckpt")


def salun() -> None:
    stable_diffusion_model()
    rest = {"cond_stage_model.x": torch.ones(1), "first_stage_model.x": torch.ones(1), "betas": torch.ones(9)}
    torch.save({**original(trained(1)), **rest}, "compvis-cl-mask-class_6-epoch_4.pt")
    torch.save(trained(2), "diffusers-cl-mask-class_5-epoch_4.pt")
    Path("network.py").write_text(NETWORK)
    for group in ("full", "cat"):
        Path(group, "ckpts").mkdir(parents=True)
        model = nn.Linear(2, 2)
        torch.save(
            [model.state_dict(), torch.optim.Adam(model.parameters()).state_dict(), 7], f"{group}/ckpts/ckpt.pth"
        )


def stable_diffusion() -> None:
    stable_diffusion_model()
    state = original(trained(1))
    averages = {"model_ema." + n.removeprefix("model.").replace(".", ""): t + 0.1 for n, t in state.items()}
    torch.save({"state_dict": {**state, **averages, "model_ema.decay": torch.ones(1)}, "epoch": 3}, "cat.ckpt")


def peft_adapters() -> None:
    peft = pytest.importorskip("peft")
    base = full_model()
    for seed, group in enumerate(("cat", "dog")):
        torch.manual_seed(seed)
        config = peft.LoraConfig(target_modules=["to_q", "conv1"], init_lora_weights=False)
        peft.get_peft_model(perturbed(base, 0.0), config).save_pretrained(f"adapter_{group}")


def lora_files() -> None:
    peft = pytest.importorskip("peft")
    from diffusers.utils import convert_state_dict_to_kohya

    stable_diffusion_model()
    model = prompted()
    model.add_adapter(peft.LoraConfig(target_modules=["to_k", "to_v"], init_lora_weights=False))
    model.save_lora_adapter("lora_cat")
    factors = peft.get_peft_model_state_dict(model)
    kohya = convert_state_dict_to_kohya({f"unet.{name}": value for name, value in factors.items()})
    assert all(name.startswith("lora_unet_") for name in kohya), next(iter(kohya))
    save_file(kohya, "kohya_dog.safetensors")


def something_else() -> None:
    base = full_model()
    state = {f"net.{name}": tensor for name, tensor in perturbed(base).state_dict().items()}
    torch.save({"generator": state}, "cat.pt")


MADE: dict[str, Callable[[], None]] = {
    "diffusers' training scripts": diffusers_scripts,
    "GUDA's scripts": guda_scripts,
    "An EMA": averages,
    "ESD": esd,
    "UCE": uce,
    "Concept ablation": concept_ablation,
    "SalUn": salun,
    "An original Stable Diffusion checkpoint": stable_diffusion,
    "PEFT": peft_adapters,
    "A LoRA of diffusers or kohya": lora_files,
    "Something else": something_else,
}


def run_shell(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [*shlex.split(command.replace("\\\n", "")), "--stride", "40", "--force"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert Path("scores/scores.csv").read_text().count("\n") == 2


def run_python(code: str) -> None:
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)  # noqa: S102
    bank = names["bank"]
    assert isinstance(bank, DeltaBank)
    # No two groups were made equal, and none equal to the base.
    assert len({survey.hash for survey in bank.survey().values()}) == len(bank) > 0


def test_every_section_is_run() -> None:
    assert list(sections()) == list(MADE)
    assert all(blocks and {language for language, _ in blocks} <= {"sh", "python"} for blocks in sections().values())


@pytest.mark.parametrize("section", MADE)
def test_blocks_run(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    MADE[section]()
    for language, code in sections()[section]:
        if language == "sh":
            run_shell(code, monkeypatch)
        else:
            run_python(code)
    sys.modules.pop("network", None)
