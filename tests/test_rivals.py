"""The rivals of the ladder: all of them compute the score, so that a faster one is not merely a wrong one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import gpu_ladder, ladder
from benchmarks.registry import Case, Contender
from benchmarks.rivals import BareForwards, PeftMerged, PeftMixed, ReferenceLoop, StackedModels, Tuned
from benchmarks.rivals.noised import NoisedRows
from benchmarks.rivals.reference_loop import batch_seed
from benchmarks.workloads import ARCHITECTURES, FORMS, RELATIVE_CHANGE, Workload, adapted_layers, make_workload
from guda_fast import Protocol
from guda_fast.deltas import Dense, LowRank

# Rounding of a float32 forward relative to its result: 32 layers or so, a unit in the last place each.
FORWARD_ROUNDING = 32 * 2.0**-24


def tuned(workload: Workload, batch: int) -> Tuned:
    return Tuned(workload, batch=batch, compiler=None)


def compiled(workload: Workload, batch: int) -> Tuned:
    return Tuned(workload, batch=batch, compiler="eager")


def inductor(workload: Workload, batch: int) -> Tuned:
    return Tuned(workload, batch=batch)


def stacked(workload: Workload, batch: int) -> StackedModels:
    return StackedModels(workload, batch=batch)


def mixed(workload: Workload, batch: int) -> PeftMixed:
    pytest.importorskip("peft")
    return PeftMixed(workload, batch=batch)


def merged(workload: Workload, batch: int) -> PeftMerged:
    pytest.importorskip("peft")
    return PeftMerged(workload, batch=batch)


SLOW = pytest.param(inductor, marks=pytest.mark.slow)  # it waits for a C++ compiler


@pytest.fixture(scope="module", params=["dense", "rank 4"])
def workload(request: pytest.FixtureRequest) -> Workload:
    """Three queries, two draws, four models."""
    return make_workload("tiny", request.param, models=3, queries=3, draws=2)


def noise_of(workload: Workload) -> Tensor:
    shape = (len(workload.queries), workload.protocol.draws, *workload.queries.shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


class Exact(NamedTuple):
    """Of a float64 loop over separate models, queries and draws; all [(K + 1, N, D)] but the weight [(D,)]."""

    weight: np.ndarray[Any, Any]
    distance: np.ndarray[Any, Any]  # || p - eps ||
    size: np.ndarray[Any, Any]  # || p ||

    @property
    def scores(self) -> np.ndarray[Any, Any]:
        """[(N, K)]"""
        errors = self.weight * self.distance**2
        return (errors[1:] - errors[0]).sum(axis=2).T

    @property
    def tolerance(self) -> np.ndarray[Any, Any]:
        """How far float32 forwards may move the scores [(N, K)].

        An error of a forward of u || p || moves w || p - eps ||^2 by at most 2 w u || p || || p - eps ||.
        """
        return _of_both(2 * FORWARD_ROUNDING * self.weight * self.size * self.distance)


def _of_both(bounds: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Sums over draws of the bounds of the base and of each counterfactual [(N, K)]."""
    return (bounds[1:] + bounds[0]).sum(axis=2).T


@torch.no_grad()
def exact(workload: Workload, noise: Tensor) -> Exact:
    table = workload.protocol.table
    found = Exact(table.weight, *(np.zeros((workload.models, *noise.shape[:2])) for _ in range(2)))
    for number in range(workload.models):
        model = torch.nn.Module.double(workload.separate(number))
        for query, x0 in enumerate(workload.queries.double()):
            for draw, t in enumerate(table.timestep):
                eps = noise[query, draw].double()
                x_t = table.x0_scale[draw] * x0 + table.eps_scale[draw] * eps
                predicted = model(x_t[None], torch.tensor([int(t)]), return_dict=False)[0][0, : len(x0)]
                found.distance[number, query, draw] = (predicted - eps).norm().item()
                found.size[number, query, draw] = predicted.norm().item()
    return found


@pytest.mark.parametrize("make", [tuned, compiled, SLOW, stacked, mixed, merged])
@pytest.mark.parametrize("batch", [4, 8])
def test_scores_are_those_of_a_float64_loop_over_separate_models(
    make: Callable[[Workload, int], Any], batch: int, workload: Workload
) -> None:
    """Twice, since what is swapped must be swapped back; 6 rows: the last batch is padded."""
    if make in (mixed, merged) and isinstance(next(iter(workload.deltas[0].parts.values())), Dense):
        pytest.skip("PEFT has no dense deltas")
    noise = noise_of(workload)
    expected = exact(workload, noise)
    # The test can fail: neighbours and a score of zero are far apart for some query.
    assert (np.abs(np.diff(expected.scores, axis=1, append=0)).max(axis=0) > 50 * expected.tolerance.max()).all()
    rival = make(workload, batch)
    for _ in range(2):
        assert (np.abs(rival.scores(workload.queries, noise) - expected.scores) <= expected.tolerance).all()


@pytest.mark.parametrize("make", [tuned, stacked])
def test_conditional_models(make: Callable[[Workload, int], Any]) -> None:
    prompted = make_workload("tiny-prompted", "rank 4", models=2, queries=2, draws=2)
    noise = noise_of(prompted)
    expected = exact(prompted, noise)
    assert (np.abs(make(prompted, 3).scores(prompted.queries, noise) - expected.scores) <= expected.tolerance).all()


def test_own_noise_is_the_same_for_all_models(workload: Workload) -> None:
    """Else scores would differ by the spread of errors, which is hundreds of times what deltas change."""
    seeds = [tuned(workload, 4).scores(workload.queries) for _ in range(2)]
    np.testing.assert_array_equal(*seeds)
    assert np.abs(seeds[0]).max() < 10 * np.abs(exact(workload, noise_of(workload)).scores).max()


@pytest.mark.parametrize("reload", [True, False])
def test_reference_loop_is_a_difference_of_divergences(reload: bool, workload: Workload, tmp_path: Path) -> None:
    """In float64, with the loop's own noise, up to the rounding of its float32 means.

    KL = || d ||^2 / (2 variance) = w || p - eps ||^2: independent errors of a standard deviation r in the elements of
    d move it by one of r || d || / variance = r sqrt(2 w / variance) || p - eps ||.
    """
    loop = ReferenceLoop(workload.save(tmp_path), workload.protocol, batch=2, reload=reload)
    drawn: list[Tensor] = []
    for start, count in ((0, 2), (2, 1)):
        generator = torch.Generator().manual_seed(batch_seed(start, 42))
        shape = (count, *workload.queries.shape[1:])
        descending = [torch.randn(shape, generator=generator) for _ in workload.protocol.timesteps]
        drawn.append(torch.stack(descending[::-1], dim=1))
    expected = exact(workload, torch.cat(drawn))
    schedule, t = workload.protocol.schedule, np.array(workload.protocol.timesteps)
    variance = schedule.betas[t] * (1 - schedule.alpha_bar[t - 1]) / (1 - schedule.alpha_bar[t])
    # Two means of five roundings each, uniform in a unit in the last place of values below 2; six deviations.
    rounding = 6 * (2 * 5 / 12) ** 0.5 * 2.0**-23
    bound = rounding * np.sqrt(2 * expected.weight / variance) * expected.distance
    tolerance = expected.tolerance + _of_both(bound)
    assert (np.abs(np.diff(expected.scores, axis=1, append=0)).max(axis=0) > 10 * tolerance.max()).all()
    assert (np.abs(loop.scores(workload.queries) - expected.scores) <= tolerance).all()


def test_all_batches_are_full(workload: Workload) -> None:
    """A last batch of another shape would be compiled again."""
    rows = NoisedRows.make(
        workload.queries,
        workload.protocol,
        4,
        device="cpu",
        dtype=torch.bfloat16,
        memory_format=torch.channels_last,
    )
    batches = [batch for _, batch in rows.batches()]
    assert [len(tensor) for batch in batches for tensor in batch] == [4] * 8
    assert rows.number == 6 and batches[0][0].dtype == torch.bfloat16 and batches[0][2].dtype == torch.float32
    assert all(batch[0].is_contiguous(memory_format=torch.channels_last) for batch in batches)


def test_refusals(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    several = Protocol(workload.protocol.schedule, (10, 20), samples=2)
    with pytest.raises(ValueError, match="one sample a timestep"):
        ReferenceLoop([], several)
    with torch._inductor.config.patch(freezing=True), pytest.raises(ValueError, match="freezing must be off"):
        inductor(workload, 4)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="needs the package peft"):
        PeftMixed(workload, batch=4)


def test_peft_takes_low_rank_deltas_alone() -> None:
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="low-rank deltas of one rank"):
        PeftMixed(make_workload("tiny", "dense", models=1, queries=1, draws=1), batch=4)


def test_another_shape_is_not_silently_eager(workload: Workload) -> None:
    """A rival that recompiles would soon be measured in eager mode."""
    rival = compiled(workload, 4)
    rival.scores(workload.queries)
    with pytest.raises(Exception, match="[Rr]ecompil"):
        rival.scores(torch.zeros(3, 3, 16, 16))


def test_bare_forwards_are_counted() -> None:
    calls: list[tuple[torch.Size, int]] = []

    def forward(x_t: Tensor, timestep: Tensor) -> None:
        calls.append((x_t.shape, len(timestep)))

    BareForwards(forward, (4, 3, 8, 8), batches=6).run()
    assert calls == [((4, 3, 8, 8), 4)] * 6


@pytest.mark.parametrize(
    ("name", "parameters", "gflop"),
    [
        ("digits", 0.70e6, None),
        ("rgb32", 0.70e6, None),
        ("ddpm-cifar10", 35.75e6, 12.4),
        ("guda-cifar10", 49.07e6, 16.8),
        ("sd15", 859.52e6, 803),
    ],
)
def test_architectures_are_as_large_as_named(name: str, parameters: float, gflop: float | None) -> None:
    """Parameters and, where the design states them, the operations of a forward."""
    assert ARCHITECTURES[name].parameters() == pytest.approx(parameters, rel=4e-3)
    if gflop is not None:
        assert ARCHITECTURES[name].flop_per_forward() / 1e9 == pytest.approx(gflop, rel=5e-3)


@pytest.mark.parametrize("form", FORMS)
def test_workloads(form: str) -> None:
    """Deltas of the stated size in every parameter or in every adapted layer; the same workload from the same seed."""
    first, second = (make_workload("tiny", form, models=2, queries=2, draws=3) for _ in range(2))
    assert first.queries.equal(second.queries) and first.queries.abs().max() <= 1
    assert len({delta.hash for delta in (*first.deltas, *second.deltas)}) == 2
    parameters = dict(first.base.named_parameters())
    names = parameters if form == "dense" else [f"{name}.weight" for name in adapted_layers(first.base)]
    assert {"conv_in.weight", "mid_block.attentions.0.to_q.weight"} <= set(names)
    assert first.changed() == sorted(names)
    base, other = first.weights(0), first.weights(2)
    for name, part in first.deltas[1].parts.items():
        assert isinstance(part, Dense if form == "dense" else LowRank)
        if parameters[name].numel() > 200:
            ratio = (other[name] - base[name]).square().mean().sqrt() / base[name].square().mean().sqrt()
            # Few elements, and products of few factors, scatter.
            assert 0.5 * RELATIVE_CHANGE < ratio < 2 * RELATIVE_CHANGE, name


def test_predictions_depend_on_input_and_timestep() -> None:
    """A network with a tiny last layer would predict nothing whatever its deltas."""
    base = make_workload("tiny", "dense", models=1, queries=1, draws=1).base
    x_t = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        predicted, later = (base(x_t, torch.full((4,), t), return_dict=False)[0] for t in (10, 900))
    assert 0.2 < float(predicted.std()) < 5
    assert float((predicted[0] - predicted[1]).std()) > 0.05
    assert float((predicted - later).std()) > 0.005


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Eager instead of traced: here it is counted who runs, and the scores of each are tested above."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    return iter(())


def run_all(cases: Sequence[Callable[[], Case]]) -> set[str]:
    """The names of all contenders; each gives scores of every cell, of noise that is everyone's own."""
    seen = set()
    for make_case in cases:
        case = make_case()
        assert case.op == "score" and case.flop > 0 and case.bytes > 0
        for contender in (case.rival, *case.contenders):
            seen.add(contender.backend)
            result = contender.call(0)
            if contender.backend != "bare forwards":
                scores = np.asarray(result)
                assert scores.shape == (3, 2) and np.isfinite(scores).all() and scores.any()
    return seen


@pytest.mark.usefixtures("no_compiler")
def test_contenders_of_the_ladder() -> None:
    pytest.importorskip("peft")
    seen = run_all(ladder.BENCHMARK.cases(True)[:2])
    assert seen == {
        "tuned compiled",
        "tuned eager",
        "guda_fast swap",
        "bare forwards",
        "vmap",
        "peft mixed",
        "peft merged",
        "reference loop",
    }


@pytest.mark.slow
@pytest.mark.usefixtures("no_compiler")
def test_contenders_of_the_ladder_on_a_gpu() -> None:
    pytest.importorskip("peft")
    assert {"tuned compiled", "tuned eager", "peft mixed", "peft merged"} <= run_all(gpu_ladder.BENCHMARK.cases(True))


def test_rivals_that_disagree_are_not_timed() -> None:
    def contender(name: str, score: float) -> Contender:
        return Contender(name, "", lambda number: np.array([[score]]))

    ladder._check_agreement([contender("tuned compiled", 1.0), contender("vmap", 1.001), contender("other noise", 2.0)])
    with pytest.raises(RuntimeError, match="vmap must give the scores of tuned compiled, got a relative error of 0.1"):
        ladder._check_agreement([contender("tuned compiled", 1.0), contender("vmap", 1.1)])
