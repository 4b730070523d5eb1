"""attribute(): queries x delta bank x protocol -> Attribution."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from guda_fast._validate import check_choice, describe
from guda_fast._version import __version__
from guda_fast.datasets.queries import QuerySet, QuerySource, load_queries
from guda_fast.deltas import DeltaBank
from guda_fast.diffusion import Protocol, Schedule
from guda_fast.errors import CancelledError
from guda_fast.estimators import Full
from guda_fast.forward import SwapPlan
from guda_fast.results import Attribution

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}

ProgressCallback = Callable[[int, int], object]
"""Called with (forwards done, forwards in all)."""


def attribute(
    queries: QuerySource,
    bank: DeltaBank,
    protocol: Protocol,
    *,
    estimator: Full | None = None,
    ids: Sequence[int] | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    precision: str = "float32",
    progress: bool | ProgressCallback = False,
    cancel: Callable[[], bool] | None = None,
) -> Attribution:
    """Score how much each group of training data mattered for each query.

        score_k(x0) = sum over draws of w_t ( e_k(t) - e_0(t) ) / samples,   e_m(t) = || eps_m(x_t, t) - eps ||^2

    the drop of the query's ELBO from the base to the counterfactual without group k, with the same noise for
    every model. Scores do not depend on batch size, order or company of the queries beyond the rounding of the
    forward (1e-5 of their scale in float32).

    queries: a folder of images, float32 values (N, C, H, W), uint8 pixels, or a sequence of image files or PIL
        images; duplicates are computed once and reported each.
    bank: base and deltas; its resident model is used, and is the base again afterwards.
    protocol: the draws; it must come from the schedule that the bank's model was trained with.
    estimator: how the score is reached [Full() by default].
    ids: query ids instead of content hashes [N, 0..2^64-1].
    batch_size: rows a forward [>= 1; 64 on a CPU, 512 on CUDA]. device: [CUDA where there is one].
    precision: of the forwards ["float32" or "float64"].
    progress: True for a bar, or a callback with (forwards done, in all).
    cancel: polled after every batch; when it returns True, CancelledError is raised.

    Returns an Attribution. Raises TypeError or ValueError naming the argument or file,
    FloatingPointError where a model gives NaN or infinity.
    Source: GUDA (arXiv 2601.22651), eq. for the delta-ELBO score; docs/scores.md.
    """
    estimator = Full() if estimator is None else estimator
    if not isinstance(estimator, Full):
        raise TypeError(f"attribute: estimator must be an estimator such as Full(), got {describe(estimator)}")
    if not (isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"attribute: progress must be a bool or a callback, got {describe(progress)}")
    if not (cancel is None or callable(cancel)):
        raise TypeError(f"attribute: cancel must be a callback, got {describe(cancel)}")
    plan, query_set = prepare(
        queries, bank, protocol, ids=ids, batch_size=batch_size, device=device, precision=precision
    )
    total = estimator.forwards(len(query_set.x0), len(bank.groups), protocol)
    with _progress_bar(progress, total) as bar:
        report = progress if callable(progress) else None
        cells = estimator.run(plan, query_set, protocol, _Counter(total, bar, report, cancel))
    row = query_set.row
    return Attribution(
        queries=query_set.names,
        query_ids=query_set.query_ids,
        groups=bank.groups,
        scores=cells.scores[row],
        std_error=cells.std_error[row],
        std_error_kind=cells.std_error_kind,
        draws=protocol.draws,
        error_base=cells.base_errors.sum(axis=1)[row],
        base_errors=cells.base_errors[row],
        provenance=provenance(bank, protocol, plan),
    )


def prepare(
    queries: QuerySource,
    bank: DeltaBank,
    protocol: Protocol,
    *,
    ids: Sequence[int] | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    precision: str = "float32",
) -> tuple[SwapPlan, QuerySet]:
    """Check the arguments of ``attribute`` and do all of its work that comes before the first forward."""
    if not isinstance(bank, DeltaBank):
        raise TypeError(f"attribute: bank must be a DeltaBank, got {describe(bank)}")
    if not isinstance(protocol, Protocol):
        raise TypeError(f"attribute: protocol must be a Protocol, got {describe(protocol)}")
    check_choice("attribute", "precision", precision, PRECISIONS)
    if bank.applied_group is not None:
        raise ValueError(
            f"attribute: bank must hold its base, got group {bank.applied_group!r} applied; call bank.restore()"
        )
    _check_unconditional(bank.model)
    _check_schedule(bank, protocol)
    place = _check_device(device)
    query_set = _load(queries, bank.model, ids)
    plan = SwapPlan(bank, protocol, batch_size=batch_size, device=place, dtype=PRECISIONS[precision])
    return plan, query_set


class _Counter:
    """Counts forwards for the bar and the caller, and asks the caller whether to go on."""

    def __init__(
        self,
        total: int,
        bar: tqdm[Any] | None,
        report: ProgressCallback | None,
        cancel: Callable[[], bool] | None,
    ) -> None:
        self.done, self.total = 0, total
        self.bar, self.report, self.cancel = bar, report, cancel

    def __call__(self, forwards: int) -> None:
        self.done += forwards
        if self.bar is not None:
            self.bar.update(forwards)
        if self.report is not None:
            self.report(self.done, self.total)
        if self.cancel is not None and self.cancel():
            raise CancelledError(f"attribute: cancelled after {self.done} of {self.total} forwards")


def _progress_bar(progress: bool | ProgressCallback, total: int) -> Any:
    if progress is True:
        return tqdm(total=total, desc="score", unit="forward", unit_scale=True, dynamic_ncols=True)
    return nullcontext(None)


def _check_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"attribute: device must be a device such as 'cpu' or 'cuda', got {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"attribute: device must be available, got {device!r} where torch finds no CUDA device")
    return chosen


_CONDITIONS = ("num_class_embeds", "class_embed_type", "cross_attention_dim", "num_embeds_ada_norm")


def _check_unconditional(model: nn.Module) -> None:
    config = getattr(model, "config", {})
    for key in _CONDITIONS:
        if isinstance(config, Mapping) and config.get(key) is not None:
            raise ValueError(
                f"attribute: bank must hold an unconditional model, got {type(model).__name__} with {key}={config[key]}"
            )


def _check_schedule(bank: DeltaBank, protocol: Protocol) -> None:
    if bank.scheduler is None:
        return
    trained = Schedule.from_scheduler(bank.scheduler)
    used = protocol.schedule
    if trained.prediction_type != used.prediction_type:
        raise ValueError(
            f"attribute: protocol must have the bank's prediction type {trained.prediction_type!r}, "
            f"got {used.prediction_type!r}"
        )
    if not np.array_equal(trained.betas, used.betas):
        raise ValueError(
            f"attribute: protocol must have the bank's noise schedule ({len(trained)} timesteps, alpha_bar down to "
            f"{trained.alpha_bar[-1]:.3g}), got {len(used)} timesteps down to {used.alpha_bar[-1]:.3g}"
        )


def _load(queries: QuerySource, model: nn.Module, ids: Sequence[int] | None) -> QuerySet:
    config = getattr(model, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None:
        if not isinstance(queries, torch.Tensor) or queries.dim() != 4:
            raise TypeError(
                "attribute: queries must be a tensor of shape (N, C, H, W) for a model whose config does not say its "
                f"channels, got {describe(queries)}"
            )
        channels = queries.shape[1]
    outputs = getattr(config, "out_channels", channels)
    if outputs not in (channels, 2 * channels):
        raise ValueError(
            f"attribute: bank must hold a model with {channels} output channels, or {2 * channels} with learned "
            f"variance, got {outputs}"
        )
    return load_queries(queries, channels=channels, size=tuple(size) if isinstance(size, list) else size, ids=ids)


def provenance(bank: DeltaBank, protocol: Protocol, plan: SwapPlan) -> dict[str, Any]:
    """What scores depend on, and how they are executed, as JSON values."""
    return {
        "base_hash": bank.base_hash,
        "delta_hashes": bank.delta_hashes,
        "protocol": protocol.to_dict(),
        "precision": str(plan.dtype).removeprefix("torch."),
        "batch_size": plan.batch_size,
        "device": plan.device.type,
        "versions": {"guda_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
