"""The steps of runs that go together: their batches, their targets, their losses and gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from guda_fast.counterfactuals.config import TrainConfig
from guda_fast.counterfactuals.frozen import FrozenBase, inputs_of
from guda_fast.counterfactuals.objective import Batch, Rows
from guda_fast.counterfactuals.run import FAILURES, Run
from guda_fast.counterfactuals.saliency import largest
from guda_fast.counterfactuals.students import concatenated

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SALIENCY_DRAWS = 8
Errors = tuple[Tensor, Tensor | None]
"""Mean squared errors of retain and forget rows, with gradients."""


class Loop:
    """Takes runs from step to step.

    model: what all runs begin as; asked for targets. config: of all runs. device: of all forwards.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.base = FrozenBase(model, device, shared=device.type != "cpu")
        self._config, self._device = config, device

    def step(self, cohorts: Sequence[Sequence[Run]]) -> dict[str, Exception]:
        """An optimiser step of every run.

        cohorts: runs that share their students, and so a forward. Returns what ended runs, which must stop: a
            FloatingPointError of those that diverged, or what was raised by a run's own objective, log or bound.
        """
        begin = time.perf_counter()
        losses: dict[str, list[tuple[float, float, float]]] = {run.name: [] for runs in cohorts for run in runs}
        ended: dict[str, Exception] = {}
        for micro in range(self._config.accumulate):
            for runs, batches in self._batches(cohorts, ended):
                with self._seeded(runs[0].step * self._config.accumulate + micro):
                    errors = self._errors(runs, batches, self._autocast())
                for run in runs:
                    losses[run.name].append(_values(run, errors[run.name]))
                    if not math.isfinite(total := losses[run.name][-1][0]):
                        what = f"the loss must stay finite, got {total} at step {run.step}"
                        ended[run.name] = FloatingPointError(what)
                self._backward([(run, errors[run.name]) for run in runs if run.name not in ended])
        records = {}
        for run in _without(cohorts, ended):
            try:
                records[run.name] = run.update(_mean(losses[run.name]))
            except FAILURES as error:
                ended[run.name] = error
        seconds = time.perf_counter() - begin
        for run in _without(cohorts, ended):
            try:
                run.keep(records[run.name], seconds)
            except FAILURES as error:
                ended[run.name] = error
        return ended

    def saliency(self, run: Run, share: float) -> list[Tensor]:
        """What ``Run.masked`` takes: the elements that matter most to the forget loss at the base.

        Without autocast: no loss scale keeps these gradients from vanishing in float16.
        """
        generator = torch.Generator().manual_seed(self._config.seed)
        sums: list[Tensor | None] = [None] * len(run.parameters)
        for draw in range(_SALIENCY_DRAWS):
            batch = run.draw(generator)
            if batch.forget is None:
                continue
            rows = [batch.retain, batch.forget]
            targets = self.base.targets({run.name: rows}, {run.name: run.conditions})[run.name]
            with self._seeded(draw):
                _, error = self._errors([run], {run.name: list(zip(rows, targets, strict=True))}, nullcontext())[
                    run.name
                ]
            found = torch.autograd.grad(error, run.parameters, allow_unused=True) if error is not None else ()
            sums = [
                new if old is None else old if new is None else old + new for old, new in zip(sums, found, strict=True)
            ]
        if all(each is None for each in sums):
            raise ValueError("train: saliency must be None for an objective without forget rows, got a share")
        return largest(sums, run.parameters, share)

    def _batches(
        self, cohorts: Sequence[Sequence[Run]], ended: dict[str, Exception]
    ) -> Iterator[tuple[Sequence[Run], dict[str, list[tuple[Rows, Tensor]]]]]:
        """The rows and targets of a fresh batch of every run that goes on, cohort by cohort."""
        rows: dict[str, list[Rows]] = {}
        for run in _without(cohorts, ended):
            try:
                rows[run.name] = _parts(run.draw())
            except FAILURES as error:
                ended[run.name] = error
        conditions = {run.name: run.conditions for run in _without(cohorts, ended)}
        with self._autocast():
            targets = self.base.targets(rows, conditions)
        for cohort in cohorts:
            if runs := [run for run in cohort if run.name in rows]:
                yield runs, {run.name: list(zip(rows[run.name], targets[run.name], strict=True)) for run in runs}

    def _errors(
        self,
        runs: Sequence[Run],
        batches: Mapping[str, Sequence[tuple[Rows, Tensor]]],
        precision: AbstractContextManager[object],
    ) -> dict[str, Errors]:
        inputs = {
            run.name: concatenated([inputs_of(rows, run.conditions) for rows, _ in batches[run.name]]) for run in runs
        }
        with precision:
            predictions = runs[0].students.predict(inputs)
        found: dict[str, Errors] = {}
        for name, parts in batches.items():
            pieces = predictions[name].split([len(rows.t) for rows, _ in parts])
            errors = [
                (piece.to(target.dtype) - target).square().mean()
                for piece, (_, target) in zip(pieces, parts, strict=True)
            ]
            found[name] = (errors[0], errors[1] if len(errors) > 1 else None)
        return found

    def _backward(self, errors: Sequence[tuple[Run, Errors]]) -> None:
        """Add the gradients of a batch to the runs' parameters; of runs with a forget share, the forget ones apart."""
        plain, apart = [], []
        for run, (retain, forget) in errors:
            if run.objective.forget_share is None or forget is None:
                plain.append(run.scaler.scale(_total(run, (retain, forget)) / self._config.accumulate))
            else:
                plain.append(run.scaler.scale(run.objective.retain_weight * retain / self._config.accumulate))
                weighted = run.objective.forget_weight * forget / self._config.accumulate
                apart.append((run, run.scaler.scale(weighted)))
        if not plain:
            return
        torch.autograd.backward(plain, retain_graph=bool(apart))
        if apart:
            parameters = [each for run, _ in apart for each in run.parameters]
            found = iter(torch.autograd.grad([loss for _, loss in apart], parameters, allow_unused=True))
            for run, _ in apart:
                run.forget_gradients.add([next(found) for _ in run.parameters])

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = _AUTOCAST.get(self._config.precision)
        return nullcontext() if dtype is None else torch.autocast(self._device.type, dtype)

    @contextmanager
    def _seeded(self, number: int) -> Iterator[None]:
        """Dropout and what else a model draws are those of this forward of a run, whatever happened before.

        The caller's random numbers stay as they are, and no other device is touched.
        """
        cuda = self._device if self._device.type == "cuda" else None
        seed = (self._config.seed + 0x9E3779B97F4A7C15 * (number + 1)) % 2**63
        with torch.random.fork_rng([] if cuda is None else [cuda]):
            torch.default_generator.manual_seed(seed)
            if cuda is not None:
                with torch.cuda.device(cuda):
                    torch.cuda.manual_seed(seed)
            yield


def _without(cohorts: Sequence[Sequence[Run]], ended: Mapping[str, Exception]) -> list[Run]:
    return [run for runs in cohorts for run in runs if run.name not in ended]


def _parts(batch: Batch) -> list[Rows]:
    return [rows for rows in (batch.retain, batch.forget) if rows is not None]


def _total(run: Run, errors: Errors) -> Tensor:
    weights = (run.objective.retain_weight, run.objective.forget_weight)
    weighted = [weight * error for weight, error in zip(weights, errors, strict=True) if error is not None]
    return torch.stack(weighted).sum()


def _values(run: Run, errors: Errors) -> tuple[float, float, float]:
    retain, forget = (None if error is None else error.detach() for error in errors)
    assert retain is not None
    missing = torch.full_like(retain, math.nan)
    found = torch.stack([_total(run, (retain, forget)), retain, missing if forget is None else forget])
    total, kept, forgotten = found.tolist()
    return total, kept, forgotten


def _mean(losses: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Of the batches of a step; the forget error over those that have forget rows."""
    total, retain, forget = zip(*losses, strict=True)
    forgotten = [value for value in forget if not math.isnan(value)]
    return (
        sum(total) / len(total),
        sum(retain) / len(retain),
        sum(forgotten) / len(forgotten) if forgotten else math.nan,
    )
