"""python -m guda_fast.frontends.cifar10: the CIFAR scorers of the GUDA paper's code, unlearned models and LOGO."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from guda_fast._validate import check_int
from guda_fast.datasets.queries import QuerySet, load_queries
from guda_fast.deltas import DeltaBank
from guda_fast.diffusion import NOISE_CONTRACT, NoiseSource, Protocol, SeededNoise
from guda_fast.diffusion.schedule import FloatArray
from guda_fast.forward import Engine
from guda_fast.forward.noised import NoisedQueries
from guda_fast.frontends.base_cache import BaseCache
from guda_fast.frontends.cifar10_csv import CLASSES, with_zeros, write_scores, write_sorted
from guda_fast.frontends.command import (
    add_execution_options,
    check_writable,
    execution,
    print_execution,
    run,
    without_missing,
)
from guda_fast.frontends.schedule import RoundedSchedule, scheduler_betas, script_protocol
from guda_fast.frontends.scoring import ImageBatches, check_rows, falling, score_images
from guda_fast.prepare import Prepared, prepare

PROGRAM = "python -m guda_fast.frontends.cifar10"


def parser() -> argparse.ArgumentParser:
    """The scripts' options, and those of the engine."""
    made = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Scores of images under unlearned models (--ckpt_base, --ckpt_unlearned) or LOGO models "
        "(--ckpt_all, --ckpt_base), with the options and files of the GUDA paper's CIFAR scripts.",
        allow_abbrev=False,
    )
    made.add_argument("--dataset", choices=tuple(CLASSES), default="cifar10", help="says how many classes [cifar10]")
    made.add_argument("--gen_dir", type=Path, required=True, help="folder of the images image_*.png")
    models = made.add_argument_group("models")
    models.add_argument(
        "--ckpt_unlearned", help="parent of unlearn_class_<k>/<epoch>/, or in single-class mode a model"
    )
    models.add_argument("--ckpt_base", type=Path, required=True, help="the base; for LOGO the parent of exclude_<k>/")
    models.add_argument("--ckpt_all", type=Path, help="the base for LOGO, which this option asks for")
    models.add_argument("--ckpt_epoch", help="sub-folder of each group's model [latest; for LOGO epoch_1200]")
    models.add_argument(
        "--single_class_mode",
        action="store_true",
        help="--ckpt_unlearned is one model, whose class is the first class_<k> in its path; others get zero",
    )
    protocol = made.add_argument_group("protocol")
    protocol.add_argument("--timesteps", type=int, default=1000, help="timesteps stay below this [1000]")
    protocol.add_argument("--skip", type=int, default=10, help="timesteps are multiples of this [10]")
    protocol.add_argument("--min_t", type=int, default=1, help="first timestep, at least 1 [1]")
    protocol.add_argument("--max_t", type=int, help="last timestep [timesteps - 1]")
    protocol.add_argument("--seed", type=int, default=42, help="of the noise [42]")
    protocol.add_argument("--batch", type=int, default=64, help="images that share a seed in reference noise [64]")
    files = made.add_argument_group("files")
    files.add_argument("--output_dir", type=Path, default=Path("."), help="where the CSV files go [.]")
    files.add_argument("--out_csv", help="their name [delta_elbo_unlearned.csv; for LOGO delta_elbo_loo.csv]")
    files.add_argument(
        "--base_elbo_cache", type=Path, help=".npz of the base's errors: read and checked if it is there, else written"
    )
    protocol.add_argument("--forward_batch", type=int, help="rows a forward at most [by model and device]")
    add_execution_options(made, "fp32", ("fp32", "bf16", "fp64", "tf32", "fp16", "auto"))
    return made


@dataclass(frozen=True)
class Models:
    """Where the models are. base: a folder. groups: a folder a class number, as text. classes: numbers of columns."""

    base: Path
    groups: dict[str, Path]
    classes: tuple[int, ...]


def find_models(options: argparse.Namespace) -> Models:
    """The base and the models of the groups that the options name.

    Raises FileNotFoundError naming a path that is not there, ValueError for options that do not go together.
    """
    count = CLASSES[options.dataset]
    if (options.ckpt_all is None) == (options.ckpt_unlearned is None):
        raise ValueError("--ckpt_unlearned or --ckpt_all: exactly one of them must be given (--ckpt_all is for LOGO)")
    base = options.ckpt_base if options.ckpt_all is None else options.ckpt_all
    if not base.is_dir():
        raise FileNotFoundError(f"{base}: must be the folder of the base model, found no such folder")
    if options.single_class_mode:
        return Models(base, _single_model(options, count), tuple(range(count)))
    if options.ckpt_all is None:
        parent, name, epoch = Path(options.ckpt_unlearned), "unlearn_class", options.ckpt_epoch or "latest"
    else:
        parent, name, epoch = options.ckpt_base, "exclude", options.ckpt_epoch or "epoch_1200"
    paths = {str(number): parent / f"{name}_{number}" / epoch for number in range(count)}
    found = {group: path for group, path in paths.items() if path.is_dir()}
    missing = {group: path for group, path in paths.items() if group not in found}
    groups = without_missing(found, missing, options.skip_missing)
    return Models(base, groups, tuple(map(int, groups)))


def _single_model(options: argparse.Namespace, count: int) -> dict[str, Path]:
    if options.ckpt_unlearned is None:
        raise ValueError("--single_class_mode: must come with --ckpt_unlearned, got --ckpt_all")
    match = re.search(r"class_(\d+)", options.ckpt_unlearned)
    if match is None or int(match[1]) >= count:
        raise ValueError(
            f"--ckpt_unlearned: must have class_<k> with k below {count} in its path in single-class mode, "
            f"got {options.ckpt_unlearned}"
        )
    path = Path(options.ckpt_unlearned)
    # An epoch is a sub-folder, as everywhere, or the one that is named already.
    if options.ckpt_epoch is not None and path.name != options.ckpt_epoch:
        path = path / options.ckpt_epoch
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: must be the folder of the unlearned model, found no such folder")
    return {str(int(match[1])): path}


def find_images(folder: Path) -> list[Path]:
    """The images of a folder, sorted. Raises FileNotFoundError where there are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--gen_dir: must be a folder of images, found no folder {folder}")
    found = sorted(path for path in folder.glob("image_*.png") if path.is_file())
    if not found:
        raise FileNotFoundError(f"--gen_dir: must hold images image_*.png, found none in {folder}")
    return found


def make_protocol(options: argparse.Namespace, bank: DeltaBank, origin: Path) -> Protocol:
    """The draws of the options: every multiple of --skip from --min_t to --max_t below --timesteps."""
    schedule = RoundedSchedule.of(bank.scheduler, str(origin))
    check_int(PROGRAM, "--timesteps", options.timesteps, 2, len(schedule))
    check_int(PROGRAM, "--skip", options.skip, 1)
    check_int(PROGRAM, "--min_t", options.min_t, 1)
    check_int(PROGRAM, "--seed", options.seed, 0, 2**64 - 1)
    last = options.timesteps - 1 if options.max_t is None else options.max_t
    timesteps = [t for t in range(0, options.timesteps, options.skip) if options.min_t <= t <= last]
    if not timesteps:
        raise ValueError(
            f"--min_t and --max_t: must leave a multiple of {options.skip}, got {options.min_t} and {last} below "
            f"{options.timesteps} timesteps"
        )
    return script_protocol(schedule, timesteps, scheduler_betas(schedule, timesteps), seed=options.seed)


def batch_seed(first: Path, seed: int) -> int:
    """What the script seeds the noise of a batch of images with, from the name of its first one."""
    return int(hashlib.sha256(f"{first.name}_{seed}".encode()).hexdigest(), 16) % 2**32


def main(arguments: Sequence[str] | None = None) -> None:
    """Score what the options name, and write the CSV files."""
    options = parser().parse_args(arguments)
    check_int(PROGRAM, "--batch", options.batch, 1)
    target = _target(options)
    models = find_models(options)
    paths = find_images(options.gen_dir)
    writes_cache = options.base_elbo_cache is not None and not options.base_elbo_cache.exists()
    check_writable({"--output_dir": target, **({"--base_elbo_cache": options.base_elbo_cache} if writes_cache else {})})
    bank = DeltaBank.load(models.base, models.groups)
    protocol = make_protocol(options, bank, models.base)
    config = getattr(bank.model, "config")  # noqa: B009 (torch.nn.Module has none)
    images = load_queries(paths, channels=config.in_channels, size=config.sample_size)
    replayed = options.noise == "reference"
    # Noise that depends on an image's place is not the same for its duplicates.
    ids = range(len(paths)) if replayed else images.query_ids
    prepared = prepare(images.x0[images.row], bank, protocol, execution(options, options.forward_batch), ids=ids)
    scores, base_errors, cache = _score(options, prepared, images, paths)
    if options.single_class_mode:
        scores = with_zeros({int(next(iter(models.groups))): scores[:, 0]}, len(models.classes), len(paths))
    names = [str(path) for path in paths]
    by_score = write_scores(target, names, models.classes, scores)
    write_sorted(by_score, names, models.classes, scores, CLASSES[options.dataset])
    print_execution(prepared, prepared.engine.choices)
    print(f"{len(paths)} images x {len(models.classes)} classes -> {target}, {by_score}")
    # After the scores: a cache that cannot be written must not cost them.
    if writes_cache and cache is not None:
        cache.write(base_errors)


def _target(options: argparse.Namespace) -> Path:
    default = "delta_elbo_unlearned.csv" if options.ckpt_all is None else "delta_elbo_loo.csv"
    name = default if options.out_csv is None else options.out_csv
    if not name.endswith(".csv"):
        raise ValueError(f"--out_csv: must end in .csv, got {name!r}")
    target: Path = options.output_dir / name
    return target


def _score(
    options: argparse.Namespace, prepared: Prepared, images: QuerySet, paths: list[Path]
) -> tuple[FloatArray, FloatArray, BaseCache | None]:
    """Scores of all images [(N, K), float64], the base's errors [(N, D), float64], and the cache that these are from,
    or that is to be written."""
    engine, distinct = prepared.engine, prepared.queries
    batches = ImageBatches(len(distinct.x0), options.batch)
    names = tuple(path.name for path in paths)
    own = tuple(names[i] for i in np.unique(distinct.row, return_index=True)[1])
    noise = _seeded_noise(options, engine, batches, paths) if options.noise == "reference" else None
    queries = engine.queries(distinct.x0, distinct.ids, own, noise=noise)
    cache = None
    if options.base_elbo_cache is not None:
        noise_of = NOISE_CONTRACT if noise is None else [options.batch, _noise_hash(noise, batches, queries.draws)]
        cache = _cache(options, engine, images, paths, noise_of)
        if options.base_elbo_cache.exists():
            _take(cache, engine, queries, distinct)
    scores: FloatArray = score_images(engine, queries, batches)[distinct.row]
    return scores, queries.base_errors[distinct.row], cache


def _seeded_noise(options: argparse.Namespace, engine: Engine, batches: ImageBatches, paths: list[Path]) -> NoiseSource:
    seeds = [batch_seed(paths[batch.start], options.seed) for batch in batches]
    sizes = [len(batch) for batch in batches]
    order = falling(engine.protocol.draws)
    return SeededNoise(seeds, sizes, order=order, shape=engine.shape, device=engine.device)


def _noise_hash(noise: NoiseSource, batches: ImageBatches, draws: int) -> str:
    """A hash of what each batch's generator gives first: it is another one on another device or torch version."""
    found = hashlib.blake2b(digest_size=16)
    for batch in batches:
        query = torch.arange(batch.start, batch.stop)
        first = noise.noise(query, torch.full_like(query, falling(draws)[0]))
        found.update(first.cpu().numpy().tobytes())
    return found.hexdigest()


def _cache(
    options: argparse.Namespace, engine: Engine, images: QuerySet, paths: list[Path], noise_of: object
) -> BaseCache:
    ids = hashlib.blake2b(np.array(images.query_ids, dtype="<u8").tobytes(), digest_size=16).hexdigest()
    config = {
        "seed": options.seed,
        "noise": options.noise,
        # What noise depends on besides: its contract, or the batches of images and the generators' values.
        "noise_of": noise_of,
        # Scores are small differences of errors, in which the rounding of one place cancels.
        "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else engine.device.type,
        "torch": str(torch.__version__),
        "base_hash": engine.bank.base_hash,
        "images": ids,
        "precision": engine.precision.name,
        "betas": engine.protocol.to_dict()["betas"],
    }
    names = [path.name for path in paths]
    timesteps = engine.protocol.timesteps
    return BaseCache(options.base_elbo_cache, names, [str(path) for path in paths], timesteps, config)


def _take(cache: BaseCache, engine: Engine, queries: NoisedQueries, distinct: QuerySet) -> None:
    """Fill the base's errors from the cache, after checking a cell of each image where it does not say what it is."""
    errors, is_own = cache.read()
    first = np.unique(distinct.row, return_index=True)[1]
    if not is_own:
        draw = np.arange(len(first)) % queries.draws
        found = check_rows(engine, queries, draw)
        cache.check_cells(errors[first, draw], found)
    queries.base_errors[:] = errors[first]
    tqdm.write(f"base: errors of {len(errors)} images from {cache.path}")


if __name__ == "__main__":
    run(PROGRAM, main)
