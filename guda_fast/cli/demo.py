"""guda-fast demo: the whole job on scikit-learn's digits, from training to a figure, in minutes on a CPU."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from guda_fast._files import atomic_write
from guda_fast.cli.draws import START, STRIDE

if TYPE_CHECKING:
    from guda_fast.cli.demo_models import ModelStages
    from guda_fast.evaluation import AgreementTable
    from guda_fast.results import Attribution

_MAX_THREADS = 4  # the demo's small networks gain nothing from more


@dataclass(frozen=True)
class Size:
    """How much the demo does: optimiser steps of base and LOGO runs and of unlearning runs, and queries."""

    steps: int
    unlearn_steps: int
    queries: int


DEFAULT = Size(steps=1200, unlearn_steps=80, queries=64)
QUICK = Size(steps=100, unlearn_steps=5, queries=12)


def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes; finished stages in it are reused.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute: sound, but too short to mean much.")] = False,
    with_logo: Annotated[
        bool, typer.Option("--with-logo", help="Also retrain without each digit and compare (10 trainings).")
    ] = False,
    steps: Annotated[int | None, typer.Option(help=f"Steps of base and LOGO runs. [{DEFAULT.steps}]", min=1)] = None,
    unlearn_steps: Annotated[
        int | None, typer.Option(help=f"Steps of unlearning runs. [{DEFAULT.unlearn_steps}]", min=1)
    ] = None,
    queries: Annotated[int | None, typer.Option(help=f"Digits to generate. [{DEFAULT.queries}]", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of weights, batches, noise and generated digits.", min=0, max=2**62)] = 0,
    threads: Annotated[int | None, typer.Option(help=f"CPU threads. [all, at most {_MAX_THREADS}]", min=1)] = None,
) -> None:
    """Which digit class made each generated digit possible? Train, unlearn ten times, score, rank, draw."""
    given = {"steps": steps, "unlearn_steps": unlearn_steps, "queries": queries}
    size = replace(QUICK if quick else DEFAULT, **{key: value for key, value in given.items() if value is not None})
    torch.set_num_threads(threads or min(_MAX_THREADS, torch.get_num_threads()))
    run = _Demo(out, size, seed)
    scores = run.attribute()
    oracle = run.attribute_by_logo() if with_logo else None
    run.report(scores, oracle)


@dataclass
class _Stopwatch:
    """Wall time of each stage, printed as a table."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - begin

    def to_markdown(self) -> str:
        width = max(map(len, self.seconds))
        rows = {**self.seconds, "all": sum(self.seconds.values())}
        lines = [f"| {stage:<{width}} | {seconds:7.1f} |" for stage, seconds in rows.items()]
        return "\n".join([f"| {'stage':<{width}} | seconds |", f"| {'-' * width} | ------: |", *lines])


class _Demo:
    """The stages in order; each leaves its result below ``out`` and finds it there the next time."""

    def __init__(self, out: Path, size: Size, seed: int) -> None:
        self.out, self.size, self.seed = out, size, seed
        self.watch = _Stopwatch()
        self.models = self._models()

    def attribute(self) -> Attribution:
        """Base, unlearned models, queries, GUDA's scores."""
        with self.watch("train the base"):
            self.models.base()
        with self.watch("unlearn each digit"):
            unlearned = self.models.unlearned()
        with self.watch("generate queries"):
            self._generate()
        with self.watch("score"):
            return self._score("scores", unlearned)

    def attribute_by_logo(self) -> Attribution:
        """LOGO models and their scores."""
        with self.watch("retrain without each digit"):
            logo = self.models.logo()
        with self.watch("score by LOGO"):
            return self._score("logo_scores", logo)

    def report(self, scores: Attribution, oracle: Attribution | None) -> None:
        """Print the tables and write them, with the figure and run.json."""
        from guda_fast.evaluation import ranking

        with self.watch("draw"):
            self._draw(scores)
        text = f"{ranking(scores.groups, scores.scores).to_markdown()}\n"
        if oracle is not None:
            table = self._agreement(scores, oracle)
            table.to_csv(self.out / "agreement.csv")
            text += f"Agreement with LOGO:\n\n{table.to_markdown()}\n"
        text += f"{self.watch.to_markdown()}\n(a reused stage takes no time)\n"
        with atomic_write(self.out / "summary.md", "w") as file:
            file.write(text)
        with atomic_write(self.out / "run.json", "w") as file:
            file.write(json.dumps(self._record(scores), indent=2) + "\n")
        typer.echo(f"\n{text}\nSee {self.out / 'figure.png'}; scores in {self.out / 'scores'}")

    def _models(self) -> ModelStages:
        from guda_fast.cli.demo_models import ModelStages, Recipe
        from guda_fast.datasets import load_digits

        recipe = Recipe(self.size.steps, self.size.unlearn_steps, self.seed)
        return ModelStages(self.out / "models", load_digits(), recipe)

    def _generate(self) -> None:
        from PIL import Image

        from guda_fast.counterfactuals.runs import finished, unfinished, write_record
        from guda_fast.diffusion.sampling import sample_images

        settings = {
            "run": "queries",
            "queries": self.size.queries,
            "sampler": "ddpm",
            "base": self.models.base_hash(),
            "seed": self.seed,
        }
        folder = self.out / "queries"
        if finished(folder, settings):
            return
        pixels = sample_images(self.models.load_base(), self.models.scheduler, self.size.queries, seed=self.seed + 1)
        with unfinished(folder) as temporary:
            for index, image in enumerate(pixels):
                Image.fromarray(image[..., 0]).save(temporary / f"{index:04d}.png")
            write_record(temporary, settings)

    def _score(self, name: str, counterfactuals: Mapping[str, Path]) -> Attribution:
        from guda_fast import Attribution, DeltaBank, Protocol, attribute
        from guda_fast.attribution import provenance
        from guda_fast.prepare import Execution, prepare
        from guda_fast.results import RECORD

        bank = DeltaBank.load(self.out / "models" / "base", counterfactuals)
        protocol = Protocol.from_scheduler(bank.scheduler or {}, start=START, stride=STRIDE)
        folder = self.out / name
        queries = self.out / "queries"
        if (folder / RECORD).exists():
            prepared = prepare(queries, bank, protocol, Execution())
            found = Attribution.from_parquet(folder)
            if found.same_run(provenance(bank, protocol, prepared), prepared.queries.query_ids):
                return found
        result = attribute(queries, bank, protocol, progress=True)
        result.to_parquet(folder)
        result.to_csv(folder / "scores.csv")
        return result

    def _draw(self, scores: Attribution) -> None:
        from guda_fast.datasets.queries import load_queries
        from guda_fast.evaluation import ranking_figure

        images = load_queries(self.out / "queries", channels=1)
        ranking_figure(
            images.x0[images.row],
            [Path(name).stem for name in scores.queries],
            scores.groups,
            scores.scores,
            scores.std_error,
            self.out / "figure.png",
        )

    def _agreement(self, scores: Attribution, oracle: Attribution) -> AgreementTable:
        from guda_fast.evaluation import agreement

        return agreement({"GUDA (ReTrack)": scores.scores}, oracle.scores, seed=self.seed)

    def _record(self, scores: Attribution) -> dict[str, object]:
        settings = {"steps": self.size.steps, "unlearn_steps": self.size.unlearn_steps, "queries": self.size.queries}
        return {
            "command": "guda-fast demo",
            **settings,
            "seed": self.seed,
            "threads": torch.get_num_threads(),
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.watch.seconds.items()},
            "scores": scores.record(),
        }
