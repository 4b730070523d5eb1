"""Files and processes for the tests of engines: tiny models, a few images, command lines in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.context import ForkProcess
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from guda_fast.cli import main
from guda_fast.store import Store
from tiny import perturbed, tiny_unet

QUERIES = 10


def make_files(folder: Path) -> Path:
    """base/ (a pipeline), unlearned/ (g0, g1, g2) and queries/ (00.png ...)."""
    base = tiny_unet()
    DDPMPipeline(base, DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder / "base")
    for number in range(3):
        perturbed(base, 0.01, number + 1).save_pretrained(folder / "unlearned" / f"g{number}")
    (folder / "queries").mkdir()
    for number in range(QUERIES):
        save_image(folder / "queries" / f"{number:02d}.png", number)
    return folder


def save_image(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def command(files: Path, store: Path, *extra: object, stride: int = 20) -> list[str]:
    """A command line that scores all of the files."""
    common = ["score", files / "queries", "--base", files / "base", "--groups", files / "unlearned"]
    how = ["--start", 5, "--stride", stride, "--shard-queries", 3, "--batch-size", 8]
    return [str(word) for word in [*common, *how, "--store", store, *extra]]


def contents(store: Path) -> dict[str, bytes]:
    """The bytes of all parts, by name."""
    return {path.name: path.read_bytes() for path in sorted((store / "parts").iterdir()) if path.suffix == ".parquet"}


def check(store: Path, expected: dict[str, bytes], *, leases: bool = False) -> None:
    """Every cell is there, once, and as in the undisturbed run; nothing is damaged, and no lease left.

    leases: whether some may be left, as where a driver was killed: nobody is there to end its last one.
    """
    assert contents(store) == expected
    assert list(Store.open(store).verify()) == []
    assert leases or [path.name for path in (store / "claims").iterdir() if not path.name.startswith(".")] == []


def start(words: Sequence[str], printed: Path, *, forks: bool = False, **environment: object) -> ForkProcess:
    """guda-fast in a process of its own, forked, so that it has no imports to wait for.

    forks: whether its workers are too, in place of spawned ones.
    """
    process = multiprocessing.get_context("fork").Process(target=_run, args=(words, printed, forks, environment))
    process.start()
    return process


def _run(words: Sequence[str], printed: Path, forks: bool, environment: dict[str, object]) -> None:
    if forks:
        fork = multiprocessing.get_context("fork")
        multiprocessing.get_context = lambda method: fork  # type: ignore[assignment]
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)  # the threads of OpenMP do not come along, and those of actors are one each
    sys.argv = ["guda-fast", *words]
    with printed.open("w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        main()


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def finished(process: ForkProcess, seconds: float = 120.0) -> int | None:
    process.join(seconds)
    assert not process.is_alive()
    return process.exitcode


def moments(seed: int, count: int, longest: float) -> Iterator[float]:
    yield from np.random.default_rng(seed).uniform(0, longest, count)
