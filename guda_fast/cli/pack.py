"""guda-fast pack: delta packs from the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guda_fast.cli.named import all_sources
from guda_fast.deltas.low_rank import TOLERANCE

if TYPE_CHECKING:
    from guda_fast.deltas import Pack, PackedGroup

pack_app = typer.Typer(
    help="Delta packs: the differences of all unlearned models from their base, in one file.", no_args_is_help=True
)
_Named = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME=PATH]...", help="Unlearned models, as for score's --group.")
]
_Groups = Annotated[
    Path | None, typer.Option(help="A folder with one unlearned model a sub-folder or weights file, named by it.")
]
_Dtype = Annotated[str, typer.Option(help="float32; float16, half the size; or stored, which loses nothing.")]
_Rank = Annotated[str, typer.Option(help="off, or auto: store dense differences of low rank as factors.")]
_Tolerance = Annotated[
    float,
    typer.Option(
        help="For --rank auto: what of a parameter's difference the factors may miss before rounding, relative."
    ),
]
_LIKE = typer.Option(help="As for build; by default what the pack's last file has.")
_LikeDtype = Annotated[str | None, _LIKE]
_LikeRank = Annotated[str | None, _LIKE]
_LikeTolerance = Annotated[float | None, _LIKE]
_Identical = Annotated[bool, typer.Option("--allow-identical", help="Accept models that equal the base.")]


@pack_app.command()
def build(
    base: Annotated[Path, typer.Argument(help="The full-data model: a diffusers folder.")],
    models: _Named = None,
    out: Annotated[Path, typer.Option(help="The pack.")] = Path("bank.safetensors"),
    groups: _Groups = None,
    dtype: _Dtype = "float32",
    rank: _Rank = "off",
    tolerance: _Tolerance = TOLERANCE,
    allow_identical: _Identical = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a pack that is at --out already.")] = False,
) -> None:
    """Write the differences of unlearned models from BASE to one file."""
    from guda_fast import build_pack

    sources = all_sources(models, groups, "NAME=PATH")
    pack = build_pack(
        base,
        sources,
        out,
        dtype=dtype,
        rank=rank,
        tolerance=tolerance,
        allow_identical=allow_identical,
        force=force,
        progress=_progress,
    )
    _print_brief(pack)


@pack_app.command()
def append(
    file: Annotated[Path, typer.Argument(help="The pack.")],
    models: _Named = None,
    base: Annotated[Path | None, typer.Option(help="The base, where it is no longer where the pack found it.")] = None,
    groups: _Groups = None,
    dtype: _LikeDtype = None,
    rank: _LikeRank = None,
    tolerance: _LikeTolerance = None,
    allow_identical: _Identical = False,
) -> None:
    """Add unlearned models to a pack, without writing again what is in it."""
    from guda_fast import append_pack

    sources = all_sources(models, groups, "NAME=PATH")
    pack = append_pack(
        file,
        sources,
        base=base,
        dtype=dtype,
        rank=rank,
        tolerance=tolerance,
        allow_identical=allow_identical,
        progress=_progress,
    )
    _print_brief(pack)


@pack_app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="The pack.")],
    check: Annotated[
        bool, typer.Option("--check", help="Read all values, and compare them with their hashes.")
    ] = False,
) -> None:
    """Print what a pack holds: groups, what each changes, how it was rounded, and where it came from."""
    from guda_fast import Pack

    pack = Pack.open(file)
    _print_head(pack)
    for group in pack.groups:
        for line in _lines(pack[group]):
            typer.echo(line)
    if check:
        for group in pack.groups:
            pack.verify(group)
        typer.echo(f"all values of {_counted(len(pack), 'group')} are those that were written")


def _progress(done: int, total: int) -> None:
    typer.echo(f"{done} of {_counted(total, 'group')} read", err=True)


def _print_head(pack: Pack) -> None:
    size = sum(path.stat().st_size for path in pack.files)
    typer.echo(
        f"{pack.path}: {_counted(len(pack), 'group')}, {_mebibytes(size)} in {_counted(len(pack.files), 'file')}"
    )
    typer.echo(f"base       {pack.base_hash} {pack.base_origin}".rstrip())
    for path, (dtype, rank, tolerance) in zip(pack.files, pack.settings, strict=True):
        low_rank = f", dense differences as factors within {tolerance:g}" if rank == "auto" else ""
        typer.echo(f"file       {path.name}: {dtype}{low_rank}")


def _print_brief(pack: Pack) -> None:
    _print_head(pack)
    for name in pack.groups:
        group = pack[name]
        typer.echo(f"{name:<10} {_support(group)}; stored {_rounding(group)}")


def _lines(group: PackedGroup) -> Iterator[str]:
    found = group.survey
    yield ""
    yield group.name
    yield f"  changes    {_support(group)}"
    yield f"  size       {found.values:,} values, {_mebibytes(found.bytes)} once read"
    yield f"  delta      rms {found.relative_rms:.3g} of the base's in these parameters, hash {found.hash}"
    yield "  cosine in  " + ", ".join(f"{name} {cosine:.4f}" for name, cosine in found.cosine.items())
    yield f"  stored     {_rounding(group)}"
    yield f"  from       {group.origin}"
    for source in group.sources:
        yield f"             {source.hash} {source.path}"


def _rounding(group: PackedGroup) -> str:
    rounding = group.rounding
    if rounding.relative_error == 0:
        return "exactly"
    return f"with cosine {rounding.cosine:.9f}, relative error {rounding.relative_error:.2e}"


def _support(group: PackedGroup) -> str:
    kinds, ranks = list(group.survey.support.values()), sorted(group.ranks.values())
    if not kinds:
        return "nothing"
    text = f"{_counted(len(kinds), 'parameter')}: {group.survey.kind}"
    if ranks:
        text += f", {len(ranks)} of rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[-1] > ranks[0] else "")
    return f"{text}, attention only" if group.survey.attention_only else text


def _mebibytes(number: int) -> str:
    return f"{number / 2**20:,.2f} MiB"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")
