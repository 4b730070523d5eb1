"""guda-fast compare: methods on the same images, how far each agrees with an oracle, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guda_fast.cli.draws import SEED, START, STRIDE
from guda_fast.cli.named import sources_in
from guda_fast.cli.runs import Data, checked_devices

if TYPE_CHECKING:
    from guda_fast.comparison import Cost, Counterfactuals, Method, Setting
    from guda_fast.results import Attribution

_COSTS = "costs.csv"


def compare(
    queries: Annotated[Path, typer.Argument(help="The images: a folder, or what score takes.")],
    base: Annotated[Path, typer.Option(help="The full-data model: a diffusers folder.")],
    data: Data,
    oracle: Annotated[
        list[Path], typer.Option(help="A folder of retrained models; once more with those of another training seed.")
    ],
    models: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER or FOLDER of unlearned models, one a group; once a method.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="pixels, unet, encoder,folder=DIR, trak, d-trak, das or query-unlearning, then ,KEY=VALUE choices, of "
            "which name= is that of its row; once a method."
        ),
    ] = None,
    conditions: Annotated[
        str | None, typer.Option(help="What the images are conditioned on, as score takes it: a file, prompt or label.")
    ] = None,
    start: Annotated[int, typer.Option(help="Of the protocol of models: first timestep.", min=0)] = START,
    stride: Annotated[int, typer.Option(help="Of the protocol of models: between timesteps.", min=1)] = STRIDE,
    seed: Annotated[int, typer.Option(help="Of the noise.", min=0)] = SEED,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ... [cuda where there is one]")] = None,
    gain: Annotated[str, typer.Option(help="Of NDCG: exponential or linear.")] = "exponential",
    reference: Annotated[str, typer.Option(help="As of evaluate: leave-one-out or mean.")] = "leave-one-out",
    resamples: Annotated[int, typer.Option(help="Bootstrap samples.", min=1)] = 10_000,
    out: Annotated[Path, typer.Option(help="Gets a result a method, which is reused, and the tables.")] = Path(
        "comparison"
    ),
) -> None:
    """Run methods on the same images, and compare each with retrained models."""
    from guda_fast.cli.score import check_out
    from guda_fast.comparison import cost_markdown, run_method, write_costs
    from guda_fast.evaluation import Options, evaluate, join
    from guda_fast.evaluation._matplotlib import load_matplotlib

    load_matplotlib("guda-fast compare")
    check_out(out)
    methods = _methods(models or [], method or [])
    oracles = {f"oracle {number}": folder for number, folder in enumerate(oracle)}
    if len(set(oracle)) < len(oracle):
        raise ValueError("--oracle: folders must differ, got one twice")
    place = checked_devices([device] if device else None)[0]
    setting = _setting(queries, conditions, base, data, oracle[0], (start, stride, seed), place)
    every: dict[str, Method] = {name: _counterfactuals(path, setting, "--oracle") for name, path in oracles.items()}
    every |= {
        name: _counterfactuals(found, setting, "--models") if isinstance(found, Path) else found
        for name, found in methods.items()
    }
    results: dict[str, Attribution] = {}
    costs: dict[str, Cost] = {}
    for name, one in every.items():
        scored = run_method(one, setting, out / "methods" / _slug(name))
        results[name], costs[name] = scored.result, scored.cost
        typer.echo(f"{name}: {'as before' if scored.reused else f'{scored.cost.seconds:,.1f} s'}")
    joined = join(results)
    report = evaluate(
        joined.groups,
        {name: joined.scores[name] for name in methods},
        [joined.scores[name] for name in oracles],
        options=Options(None, gain, reference, 0.95, resamples, 0),
        notes=joined.notes,
    )
    report.write(out)
    write_costs(out / _COSTS, costs)
    typer.echo(report.to_markdown())
    typer.echo(cost_markdown(costs))
    typer.echo(f"{len(joined.queries)} queries x {len(joined.groups)} groups -> {out}")


def _methods(models: Sequence[str], specs: Sequence[str]) -> dict[str, Path | Method]:
    """The methods by the names of their rows; folders of models are opened when the data's groups are known."""
    from guda_fast.comparison import baseline

    found: dict[str, Path | Method] = {}
    for entry in models:
        name, separator, path = entry.partition("=")
        if not separator or Path(entry).exists():
            name, path = Path(entry).absolute().name, entry
        _add(found, name, Path(path))
    for spec in specs:
        parts = spec.split(",")
        names = [part.removeprefix("name=") for part in parts if part.startswith("name=")]
        plain = ",".join(part for part in parts if not part.startswith("name="))
        _add(found, names[0] if names else plain, baseline(plain))
    if not found:
        raise ValueError("--models or --method: must name at least one method, got none")
    return found


def _add(found: dict[str, Path | Method], name: str, method: Path | Method) -> None:
    if not name or name in found:
        raise ValueError(f"--models and --method: names of rows must differ and not be empty, got {name!r}; give name=")
    if _slug(name) in map(_slug, found):
        raise ValueError(f"--models and --method: names must differ as folders too, got {name!r}; give name=")
    found[name] = method


def _slug(name: str) -> str:
    """The name of a row as that of a folder."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)


def _setting(
    queries: Path,
    conditions: str | None,
    base: Path,
    data: str,
    models: Path,
    draws: tuple[int, int, int],
    device: str,
) -> Setting:
    """What is compared on. models: any, for a bank has some."""
    from guda_fast import DeltaBank, Protocol
    from guda_fast.cli.conditioned import conditioned
    from guda_fast.comparison import Setting
    from guda_fast.datasets import open_dataset
    from guda_fast.datasets.queries import load_queries

    grouped = open_dataset(data)
    if (grouped.conditions is None) != (conditions is None):
        found = "images without conditions" if grouped.conditions is None else "images with conditions"
        raise ValueError(f"--conditions: must be given where the images of --data have some, got {found} in {data!r}")
    given = conditioned(queries, conditions, base, device)
    if "latents" in given:
        raise ValueError(f"--base: must be a model of pixels, as the training images are, got one with a vae in {base}")
    bank = DeltaBank.load(base, sources_in(models, {}, "--oracle", "--oracle"))
    if bank.scheduler is None:
        raise ValueError(f"--base: must have a scheduler_config.json in or beside it, found none in {base}")
    _, channels, height, width = grouped.images.shape
    start, stride, seed = draws
    protocol = Protocol.from_scheduler(bank.scheduler, start=start, stride=stride, seed=seed)
    images = load_queries(queries, channels=channels, size=(height, width), **given)
    bank.to(device)
    return Setting(base, bank, protocol, grouped, images, device)


def _counterfactuals(folder: Path, setting: Setting, option: str) -> Counterfactuals:
    """The models of a folder, which must be those of the data's groups."""
    from guda_fast import DeltaBank
    from guda_fast.comparison import Counterfactuals

    sources = sources_in(folder, {}, option, option)
    missing = [group for group in setting.data.groups if group not in sources]
    if missing:
        raise ValueError(f"{option}: {folder} must have a model of every group, found none of {missing[0]!r}")
    hashes = DeltaBank.load(setting.base, sources).delta_hashes
    return Counterfactuals(folder, sources, hashes)
