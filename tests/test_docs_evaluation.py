"""Every command and block of docs/evaluation.md runs, on files named as there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

import guda_fast as gf
from guda_fast.datasets import load_digits
from guda_fast.datasets.queries import load_queries
from test_p_values import result_of
from tiny import perturbed, tiny_unet

PAGE = (Path(__file__).parents[1] / "docs/evaluation.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", PAGE, re.DOTALL)


def write_files() -> None:
    """What the page names: queries/, base/, unlearned/, controls/, scores of four oracles and methods, subsets."""
    Path("queries").mkdir()
    pixels = ((load_digits().images[:6, 0].numpy() + 1) * 127.5).astype(np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(f"queries/{index}.png")
    base = tiny_unet()
    DDPMPipeline(base, DDPMScheduler(num_train_timesteps=20)).save_pretrained("base")
    for index, path in enumerate(("unlearned/cat", "unlearned/dog", "unlearned/owl", "controls/a", "controls/b")):
        perturbed(base, 0.01, 1 + index).save_pretrained(path)
    queries = load_queries("queries", channels=1)
    rng = np.random.default_rng(0)
    names = {name: [str(digit) for digit in range(10)] for name in ("retrack", "esd", "logo", "logo-seed-1")}
    for name, groups in {**names, "subsets": ["first", "second"]}.items():
        scores = rng.normal(size=(6, len(groups)))
        made = result_of(scores, groups, queries=queries.names, query_ids=queries.query_ids, provenance={})
        made.to_parquet(f"scores/{name}")
    (subsets,) = re.findall(r"`(\{\"first\".*?\})`", PAGE)
    Path("subsets.json").write_text(json.dumps(json.loads(subsets)))


def test_the_page_has_what_is_run_here() -> None:
    assert [kind for kind, _ in BLOCKS] == ["sh", "sh", "sh", "python"]


@pytest.mark.slow
def test_every_block_runs(run) -> None:
    write_files()
    said = []
    for kind, block in BLOCKS:
        if kind == "sh":
            program, *arguments = shlex.split(block.replace("\\\n", ""))
            assert program == "guda-fast"
            # The commands of the page write to one place, as its reader may not.
            code, printed = run(*arguments, "--force")
            assert code == 0, printed
            said.append(printed)
        else:
            found: dict[str, object] = {}
            exec(block, found)  # noqa: S102 (the page's own)
            result = found["result"]
            assert isinstance(result, gf.Attribution) and np.array_equal(found["p"], result.p_value)
    assert "oracle, other seed" in said[0] and "pixel cosine, mean" in said[0]
    assert "the oracle" in said[1] and "LDS" in said[1]
    assert "3 groups and 2 controls" in said[2]
    rows = re.search(r"\| file .*?\n\n", PAGE, re.DOTALL)
    listed = set(re.findall(r"`([a-z]+\.\w+)`", rows[0])) - {"significance.csv", "gaps.csv"}
    assert listed == {path.name for path in Path("evaluation").iterdir()}
