"""The CIFAR frontend against a plain script of the same description, from files to CSV, on two CPU threads.

Everything is in the time: loading the models, reading the images, the audit of a precision, writing the files. The
script runs in float32, as it is in use, and once more under autocast in the bfloat16 case.
"""

from __future__ import annotations

import contextlib
import csv
import io
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from benchmarks.contenders import architecture
from benchmarks.provenance import ROOT
from benchmarks.registry import Benchmark, Case, Contender
from benchmarks.workloads import ARCHITECTURES, make_workload
from guda_fast.audit import LARGEST_ERROR

# Of the largest score, as in the frontend's tests: what a script's float32 posterior means, and its float32 alpha_bar
# as the weights of low timesteps have it, may come to.
TOLERANCE, WEIGHTS = 5e-4, 3e-3
STEPS = 4000


@dataclass(frozen=True)
class Job:
    """What everyone scores. network: a key of ARCHITECTURES. models: K. last: the highest timestep, in steps of 10."""

    network: str = "rgb32"
    models: int = 1
    images: int = 16
    last: int = STEPS - 10

    @property
    def draws(self) -> int:
        return self.last // 10

    def __str__(self) -> str:
        return f"{self.network} dense, N={self.images} K={self.models} D={self.draws} batch={self.images}"


class Files:
    """A job's models and images in a folder that is removed with this object."""

    def __init__(self, job: Job) -> None:
        from diffusers import DDPMScheduler  # heavy

        self.job = job
        self.folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self.folder)
        self.workload = make_workload(job.network, "dense", models=job.models, queries=job.images, draws=1)
        saved = self.workload.save(self.folder / "saved")
        scheduler = DDPMScheduler(num_train_timesteps=STEPS, beta_schedule="squaredcos_cap_v2")
        self.base, *models = saved
        scheduler.save_pretrained(self.base)
        self.groups = {}
        for number, model in enumerate(models):
            target = self.folder / f"unlearned/unlearn_class_{number}/latest"
            target.parent.mkdir(parents=True)
            self.groups[number] = model.rename(target)
        (self.folder / "images").mkdir()
        pixels = ((self.workload.queries + 1) / 2 * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(self.folder / f"images/image_{number:04d}.png")

    def ours(self, name: str, *options: str, last: int | None = None) -> Path:
        """Run the frontend; returns its CSV."""
        from guda_fast.frontends import cifar10

        given = {
            "gen_dir": self.folder / "images",
            "ckpt_base": self.base,
            "ckpt_unlearned": self.folder / "unlearned",
            "output_dir": self.folder,
            "out_csv": f"{name}.csv",
            "timesteps": STEPS,
            "max_t": self.job.last if last is None else last,
            "batch": self.job.images,
        }
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            cifar10.main([*words, "--skip-missing", *options])
        return self.folder / f"{name}.csv"

    def attributed(self, last: int, precision: str) -> dict[tuple[str, str], float]:
        """What `guda_fast.attribute` gives, by image and group."""
        import guda_fast as gf

        paths = sorted((self.folder / "images").glob("*.png"))
        bank = gf.DeltaBank.load(self.base, {str(number): path for number, path in self.groups.items()})
        protocol = gf.Protocol.from_scheduler(bank.scheduler, start=10, stop=last + 1, stride=10)
        scores = gf.attribute(paths, bank, protocol, precision=precision, allow_lossy=True).scores.tolist()
        return {
            (str(path), group): score
            for path, row in zip(paths, scores, strict=True)
            for group, score in zip(bank.groups, row, strict=True)
        }

    def script(self, name: str, dtype: torch.dtype = torch.float32, last: int | None = None) -> Path:
        """Run the plain script; returns its CSV, which has zeros for the classes without a model."""
        reference = _reference()
        scorer = reference.Scorer(
            self.base, timesteps=STEPS, max_t=self.job.last if last is None else last, dtype=dtype
        )
        paths = reference.find_images(self.folder / "images")
        scores = scorer.scores(paths, self.groups, batch=self.job.images)
        reference.write_tables(self.folder / f"{name}.csv", paths, scores)
        return self.folder / f"{name}.csv"


def _reference() -> object:
    """The script that the tests hold the frontend to."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    from reference_scorers import cifar10

    return cifar10


def scores_case(dtype: torch.dtype, quick: bool) -> Case:
    """Everyone on one job, with the frontend in one precision and both kinds of noise."""
    files = Files(Job(network="tiny", images=3, last=100) if quick else Job())
    own = ["--precision", "bf16", "--allow_lossy"] if dtype == torch.bfloat16 else []
    rival = _contender("plain script, float32", partial(files.script, "script"))
    contenders = [
        _contender(f"guda_fast, {noise} noise", partial(files.ours, noise, "--noise", noise, *own))
        for noise in ("contract", "reference")
    ]
    if dtype == torch.bfloat16:
        contenders.append(_contender("plain script, autocast", partial(files.script, "autocast", dtype)))
    workload = files.workload
    rows = workload.models * files.job.images * files.job.draws
    return Case(
        op="frontend",
        shapes=str(files.job),
        dtype=str(dtype).removeprefix("torch."),
        bytes=sum(path.stat().st_size for path in files.folder.rglob("*.safetensors")),
        input_sets=1,
        rival=rival,
        contenders=contenders,
        flop=rows * ARCHITECTURES[files.job.network].flop_per_forward(),
        check=partial(check_scores, files, "bf16" if own else "fp32"),
    )


def _contender(name: str, call: Callable[[], object]) -> Contender:
    return Contender(name, architecture(), lambda number: call())


def check_scores(files: Files, precision: str = "fp32") -> None:
    """Raise where the frontend, on a few low timesteps, does not give the scores that it is held to.

    In reference noise those are the script's, in float32: below it both round, in different places. In contract noise
    those of `attribute` in the case's precision, of which the same is rounded: below float32 they agree as closely as
    the audit of a precision asks.
    """
    last = min(100, files.job.last)
    bound = WEIGHTS if precision == "fp32" else LARGEST_ERROR
    for noise, used, expected, tolerance in (
        ("reference", "fp32", _scores(files.script("expected", last=last)), TOLERANCE),
        ("contract", precision, files.attributed(last, precision), bound),
    ):
        options = ("--noise", noise, "--precision", used, "--allow_lossy")
        found = _scores(files.ours("found", *options, last=last))
        off = max(abs(found[cell] - expected[cell]) for cell in found)
        scale = max(map(abs, expected.values()))
        if not off <= tolerance * scale:
            raise RuntimeError(
                f"the frontend must give the scores in {noise} noise, got a difference of {off / scale:.2g} "
                f"(at most {tolerance:g})"
            )


def _scores(path: Path) -> dict[tuple[str, str], float]:
    with path.open(newline="") as file:
        return {(row["image"], row["class_id"]): float(row["delta_elbo"]) for row in csv.DictReader(file)}


def _cases(quick: bool) -> list[Callable[[], Case]]:
    return [partial(scores_case, dtype, quick) for dtype in (torch.float32, torch.bfloat16)]


BENCHMARK = Benchmark("frontends", _cases, ("tests/test_frontend_*.py",), threads=2, repetitions=3)
