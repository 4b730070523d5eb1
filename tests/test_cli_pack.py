"""guda-fast pack and score --pack, as typed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

import guda_fast as gf
from tiny import perturbed, tiny_unet


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ (a pipeline), unlearned/cat and unlearned/dog, later/cow (models), queries/."""
    folder = tmp_path_factory.mktemp("files")
    base = tiny_unet()
    DDPMPipeline(base, DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder / "base")
    for seed, name in enumerate(("unlearned/cat", "unlearned/dog", "later/cow"), 1):
        perturbed(base, 0.01, seed).save_pretrained(folder / name)
    (folder / "queries").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (2, 8, 8), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "queries" / f"{index}.png")
    return folder


def test_build_append_and_score_give_what_the_folders_give(files, run) -> None:
    code, printed = run("pack", "build", files / "base", "--groups", files / "unlearned", "--out", "bank.safetensors")
    assert code == 0, printed
    assert "2 groups" in printed and "cat        144 parameters: dense; stored exactly" in printed
    code, printed = run("pack", "append", "bank.safetensors", f"cow={files / 'later' / 'cow'}")
    assert code == 0, printed
    assert "3 groups" in printed and "in 2 files" in printed
    common = ["score", files / "queries", "--base", files / "base", "--start", 5, "--stride", 20]
    code, printed = run(*common, "--pack", "bank.safetensors", "--out", "packed")
    assert code == 0, printed
    group = ["--group", f"cow={files / 'later' / 'cow'}"]
    code, printed = run(*common, "--groups", files / "unlearned", *group, "--out", "folders")
    assert code == 0, printed
    packed, folders = (gf.Attribution.from_parquet(name) for name in ("packed", "folders"))
    assert sorted(packed.groups) == sorted(folders.groups)
    order = [folders.groups.index(name) for name in packed.groups]
    np.testing.assert_array_equal(packed.scores, folders.scores[:, order])
    code, printed = run("score", "--config", "packed/run.json", "--out", "again")
    assert code == 0, printed
    np.testing.assert_array_equal(gf.Attribution.from_parquet("again").scores, packed.scores)


def test_inspect_says_what_is_in_a_pack(files, run) -> None:
    cat = files / "unlearned" / "cat"
    run(
        "pack", "build", files / "base", f"the cat={cat}", "--dtype", "float16", "--rank", "auto", "--tolerance", "1e-6"
    )
    code, printed = run("pack", "inspect", "bank.safetensors", "--check")
    assert code == 0, printed
    group = gf.Pack.open("bank.safetensors")["the cat"]
    for expected in (
        r"bank.safetensors: 1 group, 0.\d\d MiB in 1 file\n",
        rf"base       [0-9a-f]{{32}} {files / 'base'}\n",
        r"file       bank.safetensors: float16, dense differences as factors within 1e-06\n",
        r"\nthe cat\n",
        r"changes    144 parameters: dense\n",
        rf"delta      rms {group.survey.relative_rms:.3g} of the base's .* hash {group.survey.hash}\n",
        r"cosine in  float16 \d\.\d{4}, bfloat16 \d\.\d{4}, tf32 \d\.\d{4}\n",
        rf"stored     with cosine 0\.99999\d+, relative error {group.rounding.relative_error:.2e}\n",
        rf"{group.sources[0].hash} {cat / 'diffusion_pytorch_model.safetensors'}\n",
        r"all values of 1 group are those that were written\n",
    ):
        assert re.search(expected, printed), (expected, printed)


def test_inspect_names_ranks_and_attention(files, run) -> None:
    base = tiny_unet()
    name = "mid_block.attentions.0.to_q.weight"
    part = gf.deltas.LowRank(perturbed(base).conv_in.bias[:, None].repeat(2, 1), base.conv_in.bias[None].repeat(1, 2))
    gf.build_pack(base, {"q": gf.deltas.Delta({name: part})}, "bank.safetensors")
    code, printed = run("pack", "inspect", "bank.safetensors")
    assert code == 0 and "changes    1 parameter: low-rank, 1 of rank 1, attention only" in printed


def test_the_commands_of_the_page(files, run, tmp_path) -> None:
    """docs/packs.md, as it is written."""
    (tmp_path / "runs").mkdir()
    places = {
        "full": "base",
        "unlearn_cat": "unlearned/cat",
        "unlearn_dog": "unlearned/dog",
        "unlearn_cow": "later/cow",
    }
    for name, place in places.items():
        (tmp_path / "runs" / name).symlink_to(files / place, target_is_directory=True)
    (tmp_path / "generated").symlink_to(files / "queries", target_is_directory=True)
    page = (Path(__file__).parent.parent / "docs" / "packs.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    guda-fast (.*)$", page, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        code, printed = run(*command.split())
        assert code == 0, printed
    assert gf.Attribution.from_parquet("scores").groups == ("cat", "dog", "cow")
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    Path("bank.safetensors").unlink()  # the program builds it too
    exec(program, names := {})  # noqa: S102 (our own page)
    assert names["bank"].groups == ("cat", "dog")


def test_damage_is_found_by_check(files, run) -> None:
    run("pack", "build", files / "base", f"cat={files / 'unlearned' / 'cat'}")
    content = bytearray(Path("bank.safetensors").read_bytes())
    content[-1] ^= 1
    Path("bank.safetensors").write_bytes(content)
    assert run("pack", "inspect", "bank.safetensors")[0] == 0
    code, printed = run("pack", "inspect", "bank.safetensors", "--check")
    assert code == 1 and "bank.safetensors: group 'cat': key '" in printed and "checksum" in printed


def test_wrong_uses_are_named_and_leave_nothing(files, run, tmp_path) -> None:
    cat, base = f"cat={files / 'unlearned' / 'cat'}", files / "base"
    for arguments, message in (
        (["build", base], "NAME=PATH or --groups: must name at least one unlearned model, got none"),
        (["build", base, "cat"], "NAME=PATH: must be NAME=PATH, got 'cat'"),
        (["build", base, cat, cat], "NAME=PATH: names must differ, got 'cat' twice"),
        (["build", base, cat, "--groups", files / "unlearned"], "also from those of NAME=PATH, got 'cat' twice"),
        (["build", base, cat, "--dtype", "int8"], "dtype must be one of 'float32', 'float16', 'stored', got 'int8'"),
        (["build", base, f"same={base}"], "equals the base"),
        (["build", "nowhere", cat], "nowhere: no such file or folder"),
        (["append", "nowhere", cat], "nowhere: no such file or folder"),
        (["inspect", base / "model_index.json"], "must be a delta pack of guda_fast"),
    ):
        code, printed = run("pack", *arguments)
        assert code == 1 and message in printed and "Traceback" not in printed, printed
        assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_replaced_on_request_only(files, run) -> None:
    build = ["pack", "build", files / "base", f"cat={files / 'unlearned' / 'cat'}"]
    assert run(*build)[0] == 0
    code, printed = run(*build)
    assert code == 1 and "bank.safetensors; pass force=True (--force) to replace it" in printed
    assert run(*build, "--force")[0] == 0


def test_a_pack_and_groups_exclude_each_other(files, run) -> None:
    run("pack", "build", files / "base", f"cat={files / 'unlearned' / 'cat'}")
    common = ["score", files / "queries", "--base", files / "base", "--pack", "bank.safetensors"]
    code, printed = run(*common, "--groups", files / "unlearned")
    assert code == 1 and "--pack: must be the only one of --pack, --group and --groups" in printed
    code, printed = run("score", files / "queries", "--base", files / "unlearned" / "cat", "--pack", "bank.safetensors")
    assert code == 1 and "key 'base.hash' must be that of the base" in printed


def test_choices_after_a_path(files, run, tmp_path) -> None:
    state = perturbed(tiny_unet(), 0.01, 1).state_dict()
    for name in ("cat.pt", "dog.pt"):
        torch.save({key: state[key] for key in list(state)[1:]}, name)
    common = ["--out", "bank.safetensors"]
    code, printed = run("pack", "build", files / "base", "cat=cat.pt,format=partial", *common)
    assert code == 0 and "1 group" in printed, printed
    code, printed = run("pack", "append", "bank.safetensors", "dog=dog.pt,format=partial")
    assert code == 0 and "2 groups" in printed, printed
