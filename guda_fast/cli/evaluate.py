"""guda-fast evaluate: how far scores agree with an oracle's, from the command line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from guda_fast._files import atomic_write
from guda_fast._json import read_object
from guda_fast._version import __version__
from guda_fast.cli.controls import attach_controls, given_controls, read_scores, without_controls
from guda_fast.cli.score import check_out
from guda_fast.results import RECORD, SCORES, WIDE, Attribution

if TYPE_CHECKING:
    from guda_fast.evaluation import Joined, Subsets
    from guda_fast.evaluation.metrics import FloatArray

_PIXEL_ROWS = {how: f"pixel cosine, {how}" for how in ("mean", "max")}
_Scores = Annotated[
    list[str],
    typer.Argument(
        metavar="[NAME=]SCORES...",
        help="Results of guda-fast score, a folder or its scores.parquet each; or scores.csv, also of other methods.",
    ),
]
_Oracle = Annotated[
    list[Path], typer.Option(help="Scores of the retrained models; once more with those of another training seed.")
]
_Controls = Annotated[
    list[str] | None,
    typer.Option(
        help="[NAME=]PATH of the scores of a method's control groups, or a pattern of group names; results of score "
        "--controls have their p-values already."
    ),
]
_Data = Annotated[str | None, typer.Option(help="Training data, as for train; with --queries, for pixel similarity.")]
_Queries = Annotated[Path | None, typer.Option(help="The folder of images that were scored.")]
_Similarity = Annotated[list[str] | None, typer.Option(help="Over a group's images: mean, max, or both. [mean]")]
_SubsetScores = Annotated[
    Path | None, typer.Option(help="Scores of models retrained without several groups, for the LDS; with --subsets.")
]
_Subsets = Annotated[Path | None, typer.Option(help='JSON: {"subset": ["group", ...]}, the groups that each lacks.')]
_Metric = Annotated[
    list[str] | None, typer.Option(help="top-k, NDCG@k, MRR, RBO, Spearman or Kendall; several times. [all]")
]
_Reference = Annotated[
    str,
    typer.Option(
        help="With several oracles: leave-one-out, each mean of all but one, as their own noise is measured; or mean."
    ),
]


def evaluate(
    context: typer.Context,
    scores: _Scores,
    oracle: _Oracle,
    controls: _Controls = None,
    data: _Data = None,
    queries: _Queries = None,
    similarity: _Similarity = None,
    subset_scores: _SubsetScores = None,
    subsets: _Subsets = None,
    metric: _Metric = None,
    gain: Annotated[str, typer.Option(help="Of NDCG: exponential or linear.")] = "exponential",
    reference: _Reference = "leave-one-out",
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    resamples: Annotated[int, typer.Option(help="Bootstrap samples.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap and the random rankings.")] = 0,
    level: Annotated[float | None, typer.Option(help="That p-values are held against. [0.05]")] = None,
    out: Annotated[Path, typer.Option(help="Gets evaluation.md, tables in CSV, agreement.png and run.json.")] = Path(
        "evaluation"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace a report that is in --out already.")] = False,
) -> None:
    """Compare scores with an oracle's: agreement by every metric, beside the oracle's own noise and chance."""
    from guda_fast.evaluation import Options, evaluate, join, significance
    from guda_fast.evaluation._matplotlib import load_matplotlib

    load_matplotlib("guda-fast evaluate")
    _check_options(context.params)
    paths = named_scores(scores)
    null, pattern = given_controls(list(paths), controls)
    methods = attach_controls({name: read_scores(path) for name, path in paths.items()}, null, pattern)
    oracles = {f"--oracle {path}": without_controls(read_scores(path), pattern) for path in oracle}
    if len(oracles) < len(oracle):
        raise ValueError("--oracle: paths must differ, got one twice")
    joined = join({**oracles, **methods})
    _check_seeds(oracles, joined)
    compared = {name: joined.scores[name] for name in methods}
    hashes: dict[str, str] = {}
    if data is not None and queries is not None:
        like = next(iter(oracles.values()))
        rows, hashes = _pixel_rows(data, queries, joined, like, similarity or ["mean"])
        compared |= rows
    with_p = {name: result for name, result in methods.items() if result.p_value is not None}
    if level is not None and not with_p:
        raise ValueError("--level: must come with scores that have p-values or controls, got none")
    report = evaluate(
        joined.groups,
        compared,
        [joined.scores[name] for name in oracles],
        options=Options(metric, gain, reference, confidence, resamples, seed),
        subsets=None if subsets is None or subset_scores is None else _subsets(subsets, subset_scores, joined),
        significance=significance(with_p, 0.05 if level is None else level) if with_p else None,
        notes=joined.notes,
    )
    report.write(out)
    inputs = {
        "methods": {name: _hashed(path) for name, path in paths.items()},
        "oracles": [_hashed(path) for path in oracle],
        "controls": {name: _hashed(path) for name, path in null.items()},
        **{name: _hashed(context.params[name]) for name in ("subset_scores", "subsets")},
        **{name: hashes.get(name) for name in ("data", "queries")},
    }
    _write_record(out, context.params, inputs)
    typer.echo(report.to_markdown())
    typer.echo(f"{len(joined.queries)} queries x {len(joined.groups)} groups -> {out}")


def _check_options(given: Mapping[str, Any]) -> None:
    """Raise what is wrong with the options before anything is read."""
    out = given["out"]
    check_out(out)
    if (out / RECORD).exists() and not given["force"]:
        raise FileExistsError(f"--out: {out} must not hold a report already, found {out / RECORD}; pass --force")
    for one, other in (("data", "queries"), ("subsets", "subset_scores")):
        if (given[one] is None) != (given[other] is None):
            raise ValueError(f"--{one}: must come with --{other.replace('_', '-')}, got one of them")
    if given["similarity"] and given["data"] is None:
        raise ValueError("--similarity: must come with --data and --queries, got neither")


def named_scores(entries: Sequence[str]) -> dict[str, Path]:
    """The results in NAME=PATH or PATH entries; a path gives its folder's or file's name.

    Raises ValueError where two names are equal, or one is that of a row of pixel similarity.

    >>> named_scores(["GUDA=runs/a", "runs/logo", "runs/esd/scores.parquet"])  # doctest: +ELLIPSIS
    {'GUDA': ...Path('runs/a'), 'logo': ...Path('runs/logo'), 'esd': ...Path('runs/esd/scores.parquet')}
    """
    found: dict[str, Path] = {}
    for entry in entries:
        name, separator, path = entry.partition("=")
        if not separator or Path(entry).exists():
            place = Path(entry).absolute()
            place = place.parent if place.name in (SCORES, WIDE) else place
            name, path = place.name.removesuffix(".parquet").removesuffix(".csv"), entry
        if not (name and path):
            raise ValueError(f"SCORES: must be PATH or NAME=PATH, got {entry!r}")
        if name in _PIXEL_ROWS.values():
            raise ValueError(f"SCORES: names must be other than those of rows of pixel similarity, got {name!r}")
        if name in found:
            raise ValueError(f"SCORES: names must differ, got {name!r} twice; write NAME=PATH")
        found[name] = Path(path)
    return found


def _check_seeds(oracles: Mapping[str, Attribution], joined: Joined) -> None:
    """Raise ValueError where two oracles are of the same models, which agree with themselves and tell of no noise."""
    for (one, first), (other, second) in combinations(oracles.items(), 2):
        if np.array_equal(joined.scores[one], joined.scores[other]):
            raise ValueError(f"{other}: must be of another training seed than {one}, found equal scores")
        known, found = (result.provenance.get("delta_hashes") or {} for result in (first, second))
        for group in joined.groups:
            if known.get(group) is not None and known.get(group) == found.get(group):
                raise ValueError(
                    f"{other}: must be of another training seed than {one}, found the same model of {group}"
                )


def _pixel_rows(
    spec: str, folder: Path, joined: Joined, like: Attribution, reductions: Sequence[str]
) -> tuple[dict[str, FloatArray], dict[str, str]]:
    """Pixel similarity of the joined queries to the joined groups, by the name of the row; hashes of what it read."""
    from guda_fast.baselines import pixel_similarity
    from guda_fast.datasets import open_dataset
    from guda_fast.datasets.grouped import GroupedImages
    from guda_fast.datasets.manifest import manifest
    from guda_fast.datasets.queries import load_queries

    data = open_dataset(spec)
    grouped = GroupedImages(data.images, {group: data.group(group) for group in joined.groups})
    _, channels, height, width = data.images.shape
    found = load_queries(folder, channels=channels, size=(height, width))
    # An id holds the condition too, which the image alone does not tell.
    conditional = bool((like.provenance.get("conditions") or {}).get("names"))
    keys: Sequence[object] = found.names if conditional else found.query_ids
    row_of = dict(zip(keys, found.row.tolist(), strict=True))
    wanted: Sequence[object] = joined.queries if conditional else joined.query_ids
    missing = [name for name, key in zip(joined.queries, wanted, strict=True) if key not in row_of]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"--queries: {folder} must hold the images that were scored, found none of {missing[0]}{more}")
    images = found.x0[[row_of[key] for key in wanted]]
    rows = {_PIXEL_ROWS.get(how, how): pixel_similarity(images, grouped, reduce=how) for how in reductions}
    listed = json.dumps(sorted(zip(found.names, found.query_ids, strict=True)))
    return rows, {"data": manifest(data)["hash"], "queries": _hash(listed.encode())}


def _subsets(path: Path, scores: Path, joined: Joined) -> Subsets:
    """The models retrained without several groups: what each lacks, and its scores of the joined queries."""
    from guda_fast.evaluation import Subsets

    given = read_object(path)
    result = read_scores(scores)
    removed = np.zeros((len(result.groups), len(joined.groups)), dtype=bool)
    for index, subset in enumerate(result.groups):
        lacks = given.get(subset)
        if not isinstance(lacks, list) or not lacks or not all(group in joined.groups for group in lacks):
            raise ValueError(
                f"{path}: {subset!r} must list groups among {', '.join(joined.groups)}, found {json.dumps(lacks)}"
            )
        removed[index, [joined.groups.index(group) for group in lacks]] = True
    return Subsets(result.scores[joined.rows_of(str(scores), result)], removed)


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _hashed(path: Path | None) -> dict[str, str] | None:
    if path is None:
        return None
    file = path / SCORES if path.is_dir() else path
    return {"path": str(file), "blake2b": _hash(file.read_bytes())}


def _write_record(out: Path, parameters: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    record = {
        "command": "guda-fast evaluate",
        "config": {key: _plain(value) for key, value in parameters.items() if key not in ("out", "force")},
        "inputs": inputs,
        "versions": {"guda_fast": __version__, "numpy": np.__version__},
    }
    with atomic_write(out / RECORD, "w") as file:
        file.write(json.dumps(record, indent=2) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
