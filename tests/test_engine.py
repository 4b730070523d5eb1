"""The engine: arbitrary rows by either plan, against a float64 loop over separate models."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

import guda_fast as gf
from guda_fast.deltas import Delta, Dense, LowRank
from guda_fast.errors import CancelledError
from guda_fast.forward import POLICIES, Engine, NoisedQueries, Rows
from guda_fast.forward._routing import Inputs
from guda_fast.forward.batches import Batches
from guda_fast.forward.noised import NoisedBatch
from guda_fast.reference import add_noise
from tiny import perturbed, tiny_unet

SHAPE = (1, 8, 8)
PROTOCOL = gf.Protocol.from_scheduler(DDPMScheduler(num_train_timesteps=100), start=5, stride=20)
IDS = (3, 2**64 - 1, 17)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return perturbed(tiny_unet(), 0.05, seed=9)


@pytest.fixture(scope="module")
def x0() -> torch.Tensor:
    return torch.rand((3, *SHAPE), generator=torch.Generator().manual_seed(0)) * 2 - 1


def deltas(base: nn.Module) -> dict[str, Delta]:
    """One dense in all parameters, one low-rank in some, one dense in a single bias."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return 0.03 * torch.randn(shape, generator=generator)

    state = dict(base.named_parameters())
    low_rank = {
        name: LowRank(normal(len(value), 2), torch.randn((2, *value.shape[1:]), generator=generator))
        for name, value in state.items()
        if name.endswith(("to_q.weight", "conv1.weight"))
    }
    return {
        "dense": Delta({name: Dense(normal(*value.shape)) for name, value in state.items()}),
        "low-rank": Delta(low_rank),
        "bias": Delta({"mid_block.resnets.0.conv2.bias": Dense(normal(16))}),
    }


def separate(base: nn.Module, delta: Delta | None) -> nn.Module:
    """The counterfactual in float64, merged by hand."""
    model = copy.deepcopy(base).double()
    with torch.no_grad():
        for name, part in (delta.parts if delta is not None else {}).items():
            tensor = dict(model.named_parameters())[name]
            if isinstance(part, Dense):
                tensor += part.value.double()
            else:
                tensor += torch.einsum("or,r...->o...", part.up.double(), part.down.double())
    return model


@torch.no_grad()
def loop(models: list[nn.Module], x0: torch.Tensor, rows: Rows) -> np.ndarray:
    """w_t || prediction - eps ||^2 in float64, row by row."""
    table = PROTOCOL.table
    ids = torch.from_numpy(np.array(IDS, dtype=np.uint64).view(np.int64))
    errors = []
    for q, m, d in zip(rows.query, rows.model, rows.draw, strict=True):
        counters = (torch.tensor([0]), ids[q : q + 1], *(torch.tensor([v[d]]) for v in (table.timestep, table.sample)))
        scales = [torch.tensor([v[d]], dtype=torch.float64) for v in (table.x0_scale, table.eps_scale)]
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        query = x0[q : q + 1].double()
        x_t = add_noise(query, *counters, *scales, seed=PROTOCOL.seed)
        eps = add_noise(query, *counters, zero, one, seed=PROTOCOL.seed)
        prediction = models[m](x_t, counters[2]).sample
        errors.append(table.weight[d] * float((prediction - eps).square().sum()))
    return np.array(errors)


def shuffled(rows: Rows, count: int) -> Rows:
    """Some of the rows, in any order, some twice."""
    return rows[torch.randint(len(rows), (count,), generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("plan", ["swap", "batched"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_any_list_of_rows_gives_the_errors_of_separate_models(base, x0, plan: str, batch_size: int) -> None:
    """In float64; the rest is rounding of float32 weights that the bank adds in float32: 1e-6 of the errors."""
    given = deltas(base)
    bank = gf.DeltaBank.load(base, given)
    models = [separate(base, delta) for delta in (None, *given.values())]
    rows = shuffled(Rows.product(3, [0, 1, 2, 3], PROTOCOL.draws), 41)
    engine = Engine(bank, PROTOCOL, SHAPE, precision=POLICIES["fp64"], batch_size=batch_size, plan=plan)
    queries = engine.queries(x0, IDS)
    done: list[int] = []
    found = engine.errors(queries, rows, done.append)
    expected = loop(models, x0, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert sum(done) == len(rows) and max(done) <= batch_size
    differences = engine.differences(queries, rows)
    of_base = loop(models, x0, Rows(rows.query, torch.zeros_like(rows.model), rows.draw))
    np.testing.assert_allclose(differences, expected - of_base, atol=1e-6 * expected.max())


@pytest.mark.parametrize("plan", ["swap", "batched"])
def test_float32_plans_agree_with_float64(base, x0, plan: str) -> None:
    given = deltas(base)
    models = [separate(base, delta) for delta in (None, *given.values())]
    rows = Rows.product(3, [1, 2, 3], PROTOCOL.draws)
    engine = Engine(gf.DeltaBank.load(base, given), PROTOCOL, SHAPE, batch_size=8, plan=plan)
    found = engine.differences(engine.queries(x0, IDS), rows)
    of_base = loop(models, x0, Rows(rows.query, torch.zeros_like(rows.model), rows.draw))
    expected = loop(models, x0, rows) - of_base
    np.testing.assert_allclose(found, expected, atol=1e-5 * of_base.max(), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["swap", "batched"])
def test_a_delta_in_any_single_parameter_counts(base, x0, plan: str) -> None:
    rows = Rows.product(1, [1], 2)
    separate_base = loop([separate(base, None)], x0, Rows.product(1, [0], 2))
    for name, value in base.named_parameters():
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
        delta = Delta({name: Dense(0.1 * value.detach().abs().max() * noise)})
        engine = Engine(
            gf.DeltaBank.load(base, {"k": delta}), PROTOCOL, SHAPE, precision=POLICIES["fp64"], batch_size=4, plan=plan
        )
        found = engine.differences(engine.queries(x0[:1], IDS[:1]), rows)
        expected = loop([nn.Identity(), separate(base, delta)], x0, rows) - separate_base
        # A bias of keys adds the same to all scores of a query, which softmax does not see: what is left is rounding.
        seen = np.abs(expected) > 1e-12 * separate_base
        assert (seen == (not name.endswith("to_k.bias"))).all(), name
        # The delta is added in float32, 6e-8 of the weight where it is a tenth of it.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-10 * separate_base.max(), err_msg=name)


@pytest.mark.parametrize("plan", ["swap", "batched"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_base_is_bit_equal_after_use(base, x0, plan: str, precision: str) -> None:
    bank = gf.DeltaBank.load(base, deltas(base))
    digest = bank.base_hash
    engine = Engine(bank, PROTOCOL, SHAPE, precision=POLICIES[precision], batch_size=5, plan=plan)
    before = {name: value.clone() for name, value in bank.model.state_dict().items()}
    engine.errors(engine.queries(x0, IDS), Rows.product(3, [0, 1, 2, 3], 2))
    assert bank.applied_group is None and bank.base_hash == digest
    assert all(torch.equal(value, before[name]) for name, value in bank.model.state_dict().items())
    bank.to(dtype=torch.float32)
    for name, value in base.state_dict().items():
        assert torch.equal(bank.model.state_dict()[name], value)


@pytest.mark.parametrize("plan", ["swap", "batched"])
def test_the_base_is_computed_once(base, x0, plan: str) -> None:
    engine = Engine(gf.DeltaBank.load(base, deltas(base)), PROTOCOL, SHAPE, batch_size=64, plan=plan)
    queries, done = engine.queries(x0, IDS), list[int]()
    rows = Rows.product(2, [1, 2], 2)
    first = engine.differences(queries, rows, done.append)
    assert sum(done) == 3 * 4
    again = engine.differences(queries, Rows.product(2, [0, 1, 2], 2), done.append)
    assert sum(done) == 3 * 4 + 2 * 4
    np.testing.assert_allclose(again[4:], first, atol=1e-5 * queries.base_errors[:2, :2].max(), rtol=0)
    assert (again[:4] == 0).all()
    assert np.isnan(queries.base_errors[2]).all()


def test_an_engine_refuses_a_bank_that_was_cast_since(base, x0) -> None:
    bank = gf.DeltaBank.load(base, deltas(base))
    engine = Engine(bank, PROTOCOL, SHAPE, batch_size=4)
    queries, rows = engine.queries(x0, IDS), Rows.product(1, [0, 1], 1)
    engine.errors(queries, rows)
    Engine(bank, PROTOCOL, SHAPE, batch_size=8)  # moves nothing
    engine.errors(queries, rows)
    bank.to(dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="bank must stay as the engine put it.*make a new one"):
        engine.errors(queries, rows)


def test_a_compiled_model_is_compiled_once(base, x0, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_, calls = torch.compile, list[int]()

    def counting(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        calls.append(len(inputs))
        return module.forward

    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend=counting, **options))
    bank = gf.DeltaBank.load(base, deltas(base))
    engine = Engine(bank, PROTOCOL, SHAPE, batch_size=8, plan="swap", compiled=True)
    rows = Rows.product(3, [0, 1, 2, 3], PROTOCOL.draws)  # 15 of each model: a batch of 8, and one of 7
    found = engine.errors(engine.queries(x0, IDS), rows)
    graphs = len(calls)
    assert graphs >= 1
    engine.errors(engine.queries(x0, IDS), rows)
    assert len(calls) == graphs
    plain = Engine(gf.DeltaBank.load(base, deltas(base)), PROTOCOL, SHAPE, batch_size=8, plan="swap")
    np.testing.assert_allclose(found, plain.errors(plain.queries(x0, IDS), rows), rtol=1e-5)


@pytest.mark.parametrize("message", ["DefaultCPUAllocator: can't allocate memory: you tried", None])
def test_the_batch_halves_when_memory_runs_out(base, x0, message: str | None) -> None:
    bank = gf.DeltaBank.load(base, deltas(base))
    engine = Engine(bank, PROTOCOL, SHAPE, batch_size=16, plan="swap")
    queries, rows = engine.queries(x0, IDS), Rows.product(3, [0, 1], PROTOCOL.draws)
    expected = engine.errors(queries, rows)
    run, sizes, done = engine.swap.forward, list[int](), list[int]()

    def small(inputs: Inputs) -> torch.Tensor:
        if len(inputs.x) > 5:
            raise torch.OutOfMemoryError("full") if message is None else RuntimeError(message)
        sizes.append(len(inputs.x))
        return run(inputs)

    engine.swap.forward = Forward(small)  # type: ignore[assignment]
    found = engine.errors(queries, rows, done.append)
    assert engine.batches.size == 4 and set(sizes) <= {1, 2, 3, 4} and sum(done) == len(rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_batch_halves_when_memory_runs_out_for_the_noise(base, x0, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = gf.DeltaBank.load(base, deltas(base))
    engine = Engine(bank, PROTOCOL, SHAPE, batch_size=4, plan="swap")
    queries, rows = engine.queries(x0, IDS), Rows.product(3, [0, 1], PROTOCOL.draws)
    expected = engine.errors(queries, rows)
    x_t = NoisedBatch.x_t

    def small(self: NoisedBatch) -> torch.Tensor:
        if len(self.timestep) > 8:
            raise torch.OutOfMemoryError("full")
        return x_t(self)

    monkeypatch.setattr(NoisedBatch, "x_t", small)
    np.testing.assert_allclose(engine.errors(queries, rows), expected, rtol=1e-5)
    assert engine.batches.size == 1


class Forward:
    def __init__(self, call: Callable[..., torch.Tensor]) -> None:
        self.call = call

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        return self.call(inputs)

    def forget_graphs(self) -> None:
        pass


@pytest.mark.parametrize("size", [1, 8])
def test_other_errors_are_not_taken_for_a_want_of_memory(x0, size: int) -> None:
    def broken(inputs: Inputs, numbers: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes differ" if size > 1 else "can't allocate memory")

    with pytest.raises(RuntimeError, match="shapes differ" if size > 1 else "can't allocate"):
        run_batches(Batches(size), x0, 9, broken)


def run_batches(batches: Batches, x0: torch.Tensor, rows: int, forward: Callable[..., torch.Tensor]) -> torch.Tensor:
    queries = NoisedQueries(x0, IDS, PROTOCOL, device=torch.device("cpu"), dtype=torch.float32)
    query, draw = torch.arange(rows) % len(x0), torch.arange(rows) % PROTOCOL.draws
    return batches.errors(queries, query, draw, forward, lambda done: None)


@pytest.mark.parametrize("size", [1, 2, 8, 24])
def test_batches_cover_every_row_once_and_pad_little(x0, size: int) -> None:
    batches = Batches(size)
    expected = run_batches(Batches(1), x0, 9 * size, lambda inputs, numbers: inputs.x)
    for rows in range(1, 9 * size):
        seen: list[torch.Tensor] = []
        x_ts: list[torch.Tensor] = []

        def forward(inputs: Inputs, numbers: torch.Tensor) -> torch.Tensor:
            assert len(inputs.x) == len(inputs.timestep) == len(numbers)
            seen.append(numbers)  # noqa: B023 (called within the turn)
            x_ts.append(inputs.x)  # noqa: B023
            return inputs.x

        found = run_batches(batches, x0, rows, forward)
        assert torch.equal(found, expected[:rows])
        sizes = [len(numbers) for numbers in seen]
        assert sizes == list(batches.sizes(rows))
        own = torch.cat(seen)[:rows] if sizes[-1] == size else torch.cat([*seen[:-1], seen[-1][: rows % size]])
        assert own.tolist() == list(range(rows))
        padding = sum(sizes) - rows
        assert padding < max(1, size // 8) or sizes[-1] == 1 << (sizes[-1].bit_length() - 1)
        assert (seen[-1][sizes[-1] - padding :] == seen[-1][0]).all()
    assert len({batches.padded(rows) for rows in range(1, size + 1)}) <= 8 + 3


@pytest.mark.parametrize("plan", ["auto", "batched"])
def test_running_out_of_memory_while_measuring_halves_too(base, x0, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = gf.DeltaBank.load(base, deltas(base))
    engine = Engine(bank, PROTOCOL, SHAPE, batch_size=16, plan=plan)
    queries, rows = engine.queries(x0, IDS), Rows.product(3, [0, 1, 2, 3], PROTOCOL.draws)
    expected = engine.errors(queries, rows)
    run = nn.Conv2d.forward

    def small(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 5:
            raise RuntimeError("can't allocate memory")
        return run(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", small)
    monkeypatch.setattr("guda_fast.forward.plan._WORTH_MEASURING", 1)
    if plan == "batched":
        batched = engine.planner.batched()
        call = batched.model.__class__.__call__
        monkeypatch.setattr(
            batched.model.__class__, "__call__", lambda self, x, *rest: refuse_above(5, x) or call(self, x, *rest)
        )
    found = engine.errors(queries, rows)
    assert engine.batches.size == 4
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def refuse_above(rows: int, x: torch.Tensor) -> None:
    if len(x) > rows:
        raise MemoryError


def test_a_group_that_overflows_stops_no_run_without_it(base, x0) -> None:
    """Measuring writes any of the models."""
    broken = Delta({"conv_in.weight": Dense(torch.full((8, 1, 3, 3), 1e38))})
    bank = gf.DeltaBank.load(base, {"broken": broken, **deltas(base)})
    engine = Engine(bank, PROTOCOL, SHAPE, batch_size=4)
    queries = engine.queries(x0, IDS, ("x", "y", "z"))
    # Of less than a batch, for which both plans are timed however quickly models are written.
    assert set(engine.choose(3, 1).seconds) == {"swap", "batched"}
    assert np.isfinite(engine.errors(queries, Rows.product(3, [0, 2, 3], PROTOCOL.draws))).all()
    with pytest.raises(FloatingPointError, match="from group 'broken' for query x at draw 0"):
        engine.errors(queries, Rows.product(3, [0, 1], PROTOCOL.draws))
    assert bank.applied_group is None


def test_a_cancelled_run_leaves_the_base(base, x0) -> None:
    bank = gf.DeltaBank.load(base, deltas(base))
    engine = Engine(bank, PROTOCOL, SHAPE, batch_size=4, plan="swap")

    def stop(done: int) -> None:
        if bank.applied_group is not None:
            raise CancelledError

    with pytest.raises(CancelledError):
        engine.errors(engine.queries(x0, IDS), Rows.product(3, [0, 1], 2), stop)
    assert bank.applied_group is None


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (
            Rows(torch.tensor([3]), torch.tensor([0]), torch.tensor([0])),
            ValueError,
            r"query must be in \[0, 3\), got 3",
        ),
        (
            Rows(torch.tensor([0]), torch.tensor([4]), torch.tensor([0])),
            ValueError,
            r"model must be in \[0, 4\), got 4",
        ),
        (Rows(torch.tensor([0]), torch.tensor([0]), torch.tensor([-1])), ValueError, r"draw must be in .*, got -1"),
        (Rows(torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([0])), ValueError, r"model must have shape"),
        (Rows(torch.tensor([0.0]), torch.tensor([0]), torch.tensor([0])), TypeError, "query must be int64"),
    ],
)
def test_rows_that_are_not_there_are_refused(base, x0, rows: Rows, error: type[Exception], message: str) -> None:
    engine = Engine(gf.DeltaBank.load(base, deltas(base)), PROTOCOL, SHAPE, batch_size=4)
    queries = engine.queries(x0, IDS)
    for call in (engine.errors, engine.differences):
        with pytest.raises(error, match=message):
            call(queries, rows)


def test_no_rows_are_no_work(base, x0) -> None:
    engine = Engine(gf.DeltaBank.load(base, deltas(base)), PROTOCOL, SHAPE, batch_size=4)
    none = torch.empty(0, dtype=torch.int64)
    assert engine.errors(engine.queries(x0, IDS), Rows(none, none, none)).shape == (0,)
