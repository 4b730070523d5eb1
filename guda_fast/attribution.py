"""attribute(): queries x delta bank x protocol -> Attribution."""

from __future__ import annotations

import platform
import time
import typing
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from guda_fast._validate import describe
from guda_fast._version import __version__
from guda_fast.candidates import BoolArray, Candidates, candidate_cells
from guda_fast.datasets.conditions import ConditionSource
from guda_fast.datasets.latents import Latents
from guda_fast.datasets.queries import QuerySet, QuerySource
from guda_fast.deltas import DeltaBank
from guda_fast.diffusion import Protocol
from guda_fast.diffusion.conditions import flat
from guda_fast.errors import CancelledError
from guda_fast.estimators import Cells, Full
from guda_fast.forward import Advance, Engine
from guda_fast.prepare import Execution, Prepared, prepare
from guda_fast.results import Attribution

ProgressCallback = Callable[[int, int], object]
"""Called with (forwards done, forwards in all); in all is the most that there may be until the run has ended."""


@typing.runtime_checkable
class Estimator(typing.Protocol):
    """How scores are reached: `Full`, `Racing`, `Budget` or `Tree`."""

    def forwards(self, considered: BoolArray, protocol: Protocol) -> int:
        """Forwards of one row each that a run with these cells takes at most [(N, K), bool]."""
        ...

    def run(self, engine: Engine, queries: QuerySet, advance: Advance, candidates: BoolArray | None = None) -> Cells:
        """Scores of the distinct queries under the candidates [(U, K), bool; all by default]."""
        ...


def attribute(
    queries: QuerySource,
    bank: DeltaBank,
    protocol: Protocol,
    *,
    conditions: ConditionSource | None = None,
    latents: Latents | None = None,
    estimator: Estimator | None = None,
    candidates: Candidates | None = None,
    ids: Sequence[int] | None = None,
    on_error: str = "stop",
    column: str | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    plan: str = "auto",
    compiled: bool = False,
    allow_lossy: bool = False,
    progress: bool | ProgressCallback = False,
    cancel: Callable[[], bool] | None = None,
) -> Attribution:
    """Score how much each group of training data mattered for each query.

        score_k(x0) = sum over draws of w_t ( e_k(t) - e_0(t) ) / samples,   e_m(t) = || eps_m(x_t, t, c) - eps ||^2

    the drop of the query's ELBO from the base to the counterfactual without group k, with the same noise for
    every model. Scores do not depend on batch size, order or company of the queries beyond the rounding of the
    forward (1e-5 of their scale in float32).

    queries: a folder of images, or Parquet, tar or safetensors files (docs/queries.md), float32 values (N, C, H, W),
        uint8 pixels, or a sequence of image files or PIL images; duplicates are computed once and reported each. The
        same image under another condition is another query.
    bank: base and deltas; its resident model is moved, cast and fused for the run, and is the base again afterwards
        (``bank.to`` casts it back without loss).
    protocol: the draws; it must come from the schedule that the bank's model was trained with.
    conditions: c of each query, for a conditional model; there is no guidance. Prompts through a text encoder, as
        ``gf.TextEncoder(folder)(prompts)``; class labels [N, integers]; or tensors with one row a query, by the name of
        the model's argument, as ``{"encoder_hidden_states": ...}``.
    latents: makes the x0 of a latent model of images, as ``gf.Latents(folder)``; without it queries are x0 themselves.
    estimator: how the score is reached, as ``gf.Racing(top=1, confidence=0.99)``, whose cells may be estimates: see
        ``Attribution.exact`` [Full() by default].
    candidates: the groups that each query is scored under, at least one: names in the order of the queries or by the
        query's name, bools [(N, K)], or a result whose cells they are, joined by query id, as
        ``result.candidates(20)``. Other cells have no score. [all by default]
    ids: query ids instead of hashes of content and condition [N, 0..2^64-1].
    on_error: what a broken image of a path does: "stop", or "skip", which leaves it out, with its condition and id, and
        puts its name and the reason into ``provenance["skipped"]``.
    column: of images in Parquet ["image"], or the tensor in safetensors [the only one of four dimensions].
    batch_size: rows a forward [>= 1; see `guda_fast.forward.Engine`]. device: [CUDA where there is one].
    precision: of the forwards ["fp64", "fp32", "bf16"; "tf32" and "fp16" on CUDA; "auto": the fastest one that passes].
        Below fp32 a few queries are scored in fp32 too, and PrecisionError is raised where the scores differ: see
        `precision_audit`. allow_lossy: go on where they differ.
    plan: how forwards are executed ["swap", "batched", or "auto": the one that is measured to be faster].
    compiled: run the swap plan's model through torch.compile.
    progress: True for a bar, or a callback with (forwards done, in all).
    cancel: polled after every batch; when it returns True, CancelledError is raised.

    Returns an Attribution. Raises TypeError or ValueError naming the argument or file,
    FloatingPointError where a model gives NaN or infinity.
    Source: GUDA (arXiv 2601.22651), eq. for the delta-ELBO score; docs/scores.md.
    """
    estimator = Full() if estimator is None else estimator
    if isinstance(estimator, type) or not isinstance(estimator, Estimator):
        raise TypeError(f"attribute: estimator must be an estimator such as Full(), got {describe(estimator)}")
    if not (isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"attribute: progress must be a bool or a callback, got {describe(progress)}")
    if not (cancel is None or callable(cancel)):
        raise TypeError(f"attribute: cancel must be a callback, got {describe(cancel)}")
    begin = time.perf_counter()
    how = Execution(batch_size, device, precision, plan, compiled, allow_lossy)
    given: Any = {"ids": ids, "conditions": conditions, "latents": latents, "on_error": on_error, "column": column}
    prepared = prepare(queries, bank, protocol, how, **given)
    query_set, prepared_at = prepared.queries, time.perf_counter()
    wanted = None if candidates is None else candidate_cells(candidates, query_set, bank.groups)
    every = np.ones((len(query_set.x0), len(bank)), dtype=bool)
    most, full = estimator.forwards(every if wanted is None else wanted, protocol), Full().forwards(every, protocol)
    with _progress_bar(progress, most) as bar:
        counter = _Counter(most, full, bar, progress if callable(progress) else None, cancel)
        result = score(prepared, query_set, estimator, counter, wanted)
        counter.finish()
    found = provenance(bank, protocol, prepared, latents)
    seconds = {"preparing": round(prepared_at - begin, 3), "scoring": round(time.perf_counter() - prepared_at, 3)}
    forwards = {"used": counter.done, "full": full}
    return result.with_provenance(**found, forwards=forwards, seconds=seconds, threads=torch.get_num_threads())


def score(
    prepared: Prepared, queries: QuerySet, estimator: Estimator, advance: Advance, wanted: BoolArray | None = None
) -> Attribution:
    """Score queries like those that an engine was prepared for, as often as there are any.

    queries: x0 is what the model takes. advance: called with the forwards of every batch; what it raises ends the run.
    wanted: the candidates of the distinct queries [(U, K), bool; all by default].

    Returns an Attribution whose provenance has what the estimator says of itself; ``provenance`` gives the rest.
    """
    cells = estimator.run(prepared.engine, queries, advance, wanted)
    row = queries.row
    return Attribution(
        queries=queries.names,
        query_ids=queries.query_ids,
        groups=prepared.engine.bank.groups,
        scores=cells.scores[row],
        std_error=cells.std_error[row],
        degrees=cells.degrees[row],
        std_error_kind=cells.std_error_kind,
        draws=cells.draws[row],
        exact=cells.exact[row],
        error_base=cells.base_errors.sum(axis=1)[row],
        base_errors=cells.base_errors[row],
        provenance=cells.details,
        race_confidence=None if cells.confidence is None else cells.confidence[row],
    )


class _Counter:
    """Counts forwards for the bar and the caller, and asks the caller whether to go on."""

    def __init__(
        self,
        most: int,
        full: int,
        bar: tqdm[Any] | None,
        report: ProgressCallback | None,
        cancel: Callable[[], bool] | None,
    ) -> None:
        self.done, self.most, self.full = 0, most, full
        self.bar, self.report, self.cancel = bar, report, cancel

    def __call__(self, forwards: int) -> None:
        self.done += forwards
        if self.bar is not None:
            self.bar.update(forwards)
        if self.report is not None:
            self.report(self.done, self.most)
        if self.cancel is not None and self.cancel():
            raise CancelledError(f"attribute: cancelled after {self.done} of {self.most} forwards")

    def racing(self, alive: int, cells: int) -> None:
        """Show how many cells are still in the race, and which share of the forwards of all cells was taken so far.

        A race calls this after each round, where what it reports forwards to has it.
        """
        if self.bar is not None:
            self.bar.set_postfix_str(f"{alive:,} of {cells:,} cells race, {self.done / self.full:.1%} of full")

    def finish(self) -> None:
        """Tell that this was all, where a run needed less than it might have."""
        if self.done >= self.most:
            return
        if self.bar is not None:
            self.bar.total = self.done
            self.bar.refresh()
        if self.report is not None:
            self.report(self.done, self.done)


def _progress_bar(progress: bool | ProgressCallback, total: int) -> Any:
    if progress is True:
        return tqdm(total=total, desc="score", unit="forward", unit_scale=True, dynamic_ncols=True)
    return nullcontext(None)


def provenance(
    bank: DeltaBank, protocol: Protocol, prepared: Prepared, latents: Latents | None = None
) -> dict[str, Any]:
    """What scores depend on, and how they are executed, as JSON values."""
    engine, conditions = prepared.engine, prepared.queries.conditions
    return {
        "base_hash": bank.base_hash,
        "delta_hashes": bank.delta_hashes,
        "protocol": protocol.to_dict(),
        "conditions": {"names": sorted(flat(conditions.tensors)), **conditions.source},
        "latents": None if latents is None else latents.to_dict(),
        "skipped": dict(prepared.queries.skipped),
        "precision": engine.precision.name,
        "rounding_cosine": dict(prepared.cosine),
        "precision_audit": None if prepared.audit is None else prepared.audit.to_dict(),
        "plan": engine.planner.wanted,
        "choices": [str(choice) for choice in engine.choices],
        "batch_size": engine.batches.size,
        "device": engine.device.type,
        "versions": {"guda_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
