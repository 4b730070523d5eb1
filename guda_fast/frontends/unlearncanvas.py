"""python -m guda_fast.frontends.unlearncanvas: the Stable Diffusion scorers of the GUDA paper's code, and LOGO."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from guda_fast._validate import check_int
from guda_fast.datasets.latents import Latents
from guda_fast.datasets.prompts import TextEncoder
from guda_fast.datasets.queries import QuerySet
from guda_fast.deltas import DeltaBank
from guda_fast.diffusion import GivenNoise, NoiseSource, Protocol
from guda_fast.forward import Engine
from guda_fast.frontends.command import (
    add_execution_options,
    check_writable,
    execution,
    print_execution,
    run,
    without_missing,
)
from guda_fast.frontends.schedule import RoundedSchedule, quotient_betas, script_protocol
from guda_fast.frontends.scoring import ImageBatches, score_images
from guda_fast.frontends.unlearncanvas_files import checkpoint, find_groups, find_images, prompts_of, write_scores
from guda_fast.prepare import prepare

PROGRAM = "python -m guda_fast.frontends.unlearncanvas"
_IMAGES = 64  # whose rows follow each other; noise does not depend on it
_NOISE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parser() -> argparse.ArgumentParser:
    """The scripts' options, a folder for what they download, and the options of the engine."""
    made = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Scores of images of many styles under unlearned models (--retrack_dir) or LOGO models "
        "(--logo_dir), with the options and files of the GUDA paper's UnlearnCanvas scripts.",
        allow_abbrev=False,
    )
    models = made.add_argument_group("models")
    models.add_argument(
        "--model", type=Path, required=True, help="folder of Stable Diffusion as diffusers saves it; never downloaded"
    )
    models.add_argument("--allclass_dir", type=Path, required=True, help="folder of the base's checkpoints")
    models.add_argument("--checkpoint_step", type=int, default=7500, help="of the base, and of LOGO models [7500]")
    models.add_argument("--retrack_dir", type=Path, help="parent of unlearned models <Style>/checkpoint_step_<n>.pt")
    models.add_argument("--retrack_checkpoint_step", type=int, default=5000, help="of unlearned models [5000]")
    models.add_argument("--logo_dir", type=Path, help="parent of LOGO models <Style>/; instead of --retrack_dir")
    models.add_argument("--styles", nargs="+", help="styles to score [all sub-folders]")
    files = made.add_argument_group("files")
    files.add_argument("--image_dir", type=Path, required=True, help="folder of <Style>/<Style>_<Object>.png")
    files.add_argument("--eval_prompts_file", type=Path, required=True, help="JSON lines of style, object, prompt")
    files.add_argument("--output_dir", type=Path, default=Path("."), help="where the CSV file goes [.]")
    files.add_argument("--output_filename", help="its name [una_retrack_scores.csv; for LOGO logoa_scores.csv]")
    protocol = made.add_argument_group("protocol")
    protocol.add_argument("--num_noise_samples", type=int, default=1, help="noise samples a timestep [1]")
    protocol.add_argument("--seed", type=int, default=42, help="of the noise [42]")
    protocol.add_argument("--min_timestep", type=int, default=10, help="first timestep [10]")
    protocol.add_argument("--max_timestep", type=int, default=999, help="last timestep [999]")
    protocol.add_argument("--timestep_stride", type=int, default=10, help="distance of timesteps [10]")
    protocol.add_argument("--batch_size", type=int, help="rows a forward at most [by model and device]")
    protocol.add_argument(
        "--latents",
        choices=("mode", "sample"),
        default="mode",
        help="of the VAE's posterior; the script samples, without a seed, so that no two of its runs agree [mode]",
    )
    protocol.add_argument(
        "--noise_dtype",
        choices=tuple(_NOISE_DTYPES),
        help="that reference noise is drawn in [--precision, as in the script]",
    )
    add_execution_options(made, "bf16", tuple(_NOISE_DTYPES))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Score what the options name, and write the CSV file."""
    options = parser().parse_args(arguments)
    target = _target(options)
    images = find_images(options.image_dir)
    prompts = prompts_of(images, options.eval_prompts_file)
    base, groups = _find_models(options)
    check_writable({"--output_dir": target})
    scheduler = options.model / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        raise FileNotFoundError(f"--model: must hold the scheduler's configuration, found no file {scheduler}")
    bank = DeltaBank.load(_base_model(base, options.model), groups, scheduler=scheduler)
    protocol = _protocol(options, bank)
    prepared = prepare(
        [image.path for image in images],
        bank,
        protocol,
        execution(options, options.batch_size),
        conditions=TextEncoder(options.model, device=options.device)(prompts),
        latents=Latents(options.model, mode=options.latents, seed=options.seed, device=options.device),
    )
    engine, found = prepared.engine, prepared.queries
    noise = None
    if options.noise == "reference":
        found, noise = _by_place(found), _replayed_noise(options, engine, len(found))
    queries = engine.queries(found.x0, found.ids, found.distinct_names, conditions=found.conditions, noise=noise)
    scores = score_images(engine, queries, ImageBatches(len(found.x0), _IMAGES))[found.row]
    column = "una_score" if options.logo_dir is None else "logoa_score"
    write_scores(target, column, options.image_dir, images, dict(zip(bank.groups, scores.T, strict=True)))
    print_execution(prepared, engine.choices)
    print(f"{len(images)} images x {len(bank.groups)} styles -> {target}")


def _target(options: argparse.Namespace) -> Path:
    default = "una_retrack_scores.csv" if options.logo_dir is None else "logoa_scores.csv"
    target: Path = options.output_dir / (options.output_filename or default)
    return target


def _find_models(options: argparse.Namespace) -> tuple[Path, dict[str, Path]]:
    """The base, a folder or a file, and the groups' models by style."""
    if (options.retrack_dir is None) == (options.logo_dir is None):
        raise ValueError("--retrack_dir or --logo_dir: exactly one of them must be given")
    check_int(PROGRAM, "--checkpoint_step", options.checkpoint_step, 0)
    check_int(PROGRAM, "--retrack_checkpoint_step", options.retrack_checkpoint_step, 0)
    base = checkpoint(options.allclass_dir, options.checkpoint_step)
    if base is None and (options.allclass_dir / "unet").is_dir():
        base = options.allclass_dir
    if base is None:
        raise FileNotFoundError(
            f"{options.allclass_dir}: must hold the base as checkpoint_step_{options.checkpoint_step}.pt, as a folder "
            f"checkpoint-{options.checkpoint_step}/ or checkpoint_step_{options.checkpoint_step}/, or in unet/, found "
            "none"
        )
    parent, step = options.logo_dir, options.checkpoint_step
    if options.logo_dir is None:
        parent, step = options.retrack_dir, options.retrack_checkpoint_step
    found, missing = find_groups(parent, step, options.styles)
    return base, without_missing(found, missing, options.skip_missing)


def _base_model(base: Path, model: Path) -> Path | nn.Module:
    """What a bank takes as its base: a file has no architecture, and gets that of Stable Diffusion itself."""
    if base.is_dir():
        return base
    plain = DeltaBank.load(model / "unet", {"base": base}, allow_identical=True)
    return plain.apply("base")


def _protocol(options: argparse.Namespace, bank: DeltaBank) -> Protocol:
    schedule = RoundedSchedule.of(bank.scheduler, str(options.model))
    check_int(PROGRAM, "--min_timestep", options.min_timestep, 1, len(schedule) - 1)
    check_int(PROGRAM, "--max_timestep", options.max_timestep, options.min_timestep, len(schedule) - 1)
    check_int(PROGRAM, "--timestep_stride", options.timestep_stride, 1)
    timesteps = list(range(options.min_timestep, options.max_timestep + 1, options.timestep_stride))
    betas = quotient_betas(schedule, timesteps)
    return script_protocol(schedule, timesteps, betas, seed=options.seed, samples=options.num_noise_samples)


def _by_place(found: QuerySet) -> QuerySet:
    """Every image for itself, where noise is another at another place; latents stay those of the image's content."""
    row, place = torch.from_numpy(found.row), range(len(found))
    return QuerySet(found.x0[row], tuple(place), found.names, np.arange(len(found)), found.conditions[row])


def _replayed_noise(options: argparse.Namespace, engine: Engine, images: int) -> NoiseSource:
    """One ``randn`` of all samples, timesteps and images, in the dtype that the script has it in."""
    protocol = engine.protocol
    generator = torch.Generator(engine.device).manual_seed(options.seed)
    shape = (protocol.samples, len(protocol.timesteps), images, *engine.shape)
    dtype = _NOISE_DTYPES[options.noise_dtype or options.precision]
    values = torch.randn(shape, generator=generator, device=engine.device, dtype=dtype)
    # By image and draw, samples innermost: a view for one sample.
    return GivenNoise(values.permute(2, 1, 0, *range(3, values.dim())).flatten(1, 2))


if __name__ == "__main__":
    run(PROGRAM, main)
