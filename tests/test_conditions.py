"""Conditions in the engine: both plans against a float64 loop over separate models, and what they compute once."""

from __future__ import annotations

import copy
import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import guda_fast as gf
from conditional import FEATURES, MODELS, TOKENS, conditions_of, loop_errors
from guda_fast.diffusion.conditions import Conditions, flat
from guda_fast.forward import POLICIES, Engine, Rows
from tiny import perturbed

SHAPE = (4, 8, 8)
PROTOCOL = gf.Protocol.from_scheduler(DDPMScheduler(num_train_timesteps=100), start=5, stride=50)
IDS = (3, 2**64 - 1, 17, 5)
ROW = [0, 1, 1, 2]


@pytest.fixture(scope="module")
def x0() -> torch.Tensor:
    # The second and third query differ in their ids alone.
    images = torch.rand((4, *SHAPE), generator=torch.Generator().manual_seed(0)) * 2 - 1
    images[2] = images[1]
    return images


def bank_of(base: torch.nn.Module) -> gf.DeltaBank:
    return gf.DeltaBank.load(base, {f"g{k}": perturbed(base, 0.02, k) for k in (1, 2)})


def expected(base: torch.nn.Module, x0: torch.Tensor, conditions: Conditions) -> np.ndarray:
    """Errors in the order of `Rows.product` over the base and both groups."""
    models = [base, perturbed(base, 0.02, 1), perturbed(base, 0.02, 2)]
    found = [loop_errors(copy.deepcopy(model).double(), x0, IDS, conditions, PROTOCOL) for model in models]
    return np.stack(found).ravel()


@pytest.mark.parametrize("network", MODELS)
@pytest.mark.parametrize("plan", ["swap", "batched"])
def test_every_row_has_the_condition_of_its_query(x0, network: str, plan: str) -> None:
    """In float64; the rest is rounding of float32 weights that the bank adds in float32: 1e-6 of the errors."""
    base, conditions = MODELS[network](), conditions_of(network, ROW)
    wanted = expected(base, x0, conditions)
    rows = Rows.product(4, [0, 1, 2], PROTOCOL.draws)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    # 24 rows in batches of 5: the last one is padded.
    engine = Engine(
        bank_of(base), PROTOCOL, SHAPE, conditions=conditions, precision=POLICIES["fp64"], batch_size=5, plan=plan
    )
    found = engine.errors(engine.queries(x0, IDS, conditions=conditions), rows[order])
    np.testing.assert_allclose(found, wanted[order.numpy()], rtol=1e-6)
    swapped = conditions_of(network, [1, 0, 2, 1])
    other = engine.errors(engine.queries(x0, IDS, conditions=swapped), rows)
    assert (np.abs(other - wanted) > 1e-4 * wanted).all(), "each condition must matter, or this shows nothing"


@pytest.mark.parametrize("plan", ["swap", "batched"])
def test_float32_and_bfloat16_are_near_float64(x0, plan: str) -> None:
    """Relative to the largest error: 1e-5 as without conditions; bfloat16 keeps 8 bits through some 60 layers."""
    base, conditions = MODELS["prompts, added"](), conditions_of("prompts, added", ROW)
    wanted = expected(base, x0, conditions)
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 5e-2)):
        engine = Engine(bank_of(base), PROTOCOL, SHAPE, conditions=conditions, precision=POLICIES[precision], plan=plan)
        queries = engine.queries(x0, IDS, conditions=conditions)
        found = engine.errors(queries, Rows.product(4, [0, 1, 2], PROTOCOL.draws))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * wanted.max())
        tensors = flat(queries.conditions.tensors)
        assert tensors["encoder_hidden_states"].dtype == POLICIES[precision].dtype
        assert tensors["added_cond_kwargs.time_ids"].dtype == torch.int64


def test_text_is_projected_once_a_model_and_prompt(x0) -> None:
    conditions = conditions_of("prompts", ROW)
    engine = Engine(bank_of(MODELS["prompts"]()), PROTOCOL, SHAPE, conditions=conditions, batch_size=64, plan="batched")
    engine.errors(engine.queries(x0, IDS, conditions=conditions), Rows.product(4, [0, 1, 2], PROTOCOL.draws))
    computed = engine.planner.batched().model.computed_rows
    keys = {count for name, count in computed.items() if "attn2.to_k" in name or "attn2.to_v" in name}
    assert keys == {3 * 3}


def test_measuring_uses_the_conditions(x0) -> None:
    conditions = conditions_of("prompts", ROW)
    engine = Engine(bank_of(MODELS["prompts"]()), PROTOCOL, SHAPE, conditions=conditions)
    longer = Conditions({"encoder_hidden_states": torch.zeros(1, 2 * TOKENS, FEATURES)}, torch.zeros(4).long())
    assert engine.flop > 0 and engine.activation_bytes_a_row > 0
    assert Engine(engine.bank, PROTOCOL, SHAPE, conditions=longer).flop > engine.flop
    choice = engine.choose(3, 64)
    assert set(choice.seconds) == {"swap", "batched"} or choice.plan == "swap"
    assert engine.seconds(choice, 3, 64) > 0
    assert np.isfinite(engine.errors(engine.queries(x0, IDS, conditions=longer), Rows.product(4, [0, 1], 1))).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_read_the_conditions_of_each_batch(x0) -> None:
    base, conditions = MODELS["prompts, added"](), conditions_of("prompts, added", ROW)
    wanted = expected(base, x0, conditions)
    for plan in ("swap", "batched"):
        engine = Engine(bank_of(base), PROTOCOL, SHAPE, conditions=conditions, device="cuda", batch_size=4, plan=plan)
        for chosen in (conditions, conditions_of("prompts, added", ROW)):
            queries = engine.queries(x0, IDS, conditions=chosen)
            found = engine.errors(queries, Rows.product(4, [0, 1, 2], PROTOCOL.draws))
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * wanted.max())


def test_some_queries_keep_their_conditions_and_no_others() -> None:
    conditions = Conditions(
        {"a": torch.arange(4.0)[:, None], "b": {"c": torch.arange(4)}}, torch.tensor([3, 1, 3, 0]), ("p", "q", "r", 7)
    )
    few = conditions[torch.tensor([2, 1])]
    assert few.row.tolist() == [1, 0] and few.keys == ("q", 7)
    assert few.tensors["a"].tolist() == [[1.0], [3.0]] and few.tensors["b"]["c"].tolist() == [1, 3]  # type: ignore[index]
    assert conditions[1:].row.tolist() == [1, 2, 0] and conditions[1:].count == 3
    assert conditions.bytes_a_row == 4 + 8
    taken = few.take(torch.tensor([1, 1, 0]))
    assert taken["a"].flatten().tolist() == [3.0, 3.0, 1.0] and taken["b"]["c"].tolist() == [3, 3, 1]


def test_none_is_no_special_case() -> None:
    none = Conditions.none(3)
    assert len(none) == 3 and none.count == 1 and none.bytes_a_row == 0
    assert none[1:].row.tolist() == [0, 0] and none.take(torch.tensor([0, 0])) == {}
    assert none.to(torch.device("cpu"), torch.bfloat16).tensors == {}


def test_digests_tell_values_names_types_and_shapes_apart() -> None:
    def digests(tensors: Mapping[str, Any]) -> tuple[bytes, ...]:
        count = len(next(iter(flat(tensors).values())))
        return Conditions(tensors, torch.zeros(1, dtype=torch.int64)[:count]).digests()

    values = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 3.0]])
    first, second, third = digests({"a": values})
    assert first == second != third
    assert digests({"a": values[:1]}) == (first,)
    others = [{"b": values}, {"a": {"b": values}}, {"a": values.double()}, {"a": values[:, None]}]
    assert len({first, *(digests(other)[0] for other in others)}) == 5
    plain = hashlib.blake2b(b"a float32 2 " + struct.pack("<2f", 1.0, 2.0)).digest()
    assert first == plain
    nested = {"b": {"c": torch.tensor([[[5], [6]]])}, "a": values[:1]}
    both = hashlib.blake2b(
        b"a float32 2 " + struct.pack("<2f", 1.0, 2.0) + b"b.c int64 2,1 " + struct.pack("<2q", 5, 6)
    )
    assert digests(nested) == (both.digest(),)


ONE = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({"a": torch.zeros(2, 3)}, torch.tensor([0.0])), TypeError, "Conditions: row must be int64, got float32"),
        (({"a": torch.zeros(2, 3)}, torch.tensor([2])), ValueError, r"Conditions: row must be in \[0, 2\), got 2"),
        (({}, torch.tensor([1])), ValueError, r"Conditions: row must be in \[0, 1\), got 1"),
        (({"a": torch.zeros(1), "b": {"c": torch.zeros(2)}}, ONE), ValueError, r"b\.c must have 1 rows as the others"),
        (({"a": torch.tensor(1.0)}, ONE), ValueError, "a must have at least 1 dimensions"),
        (({"a": [1]}, ONE), TypeError, r"Conditions: a must be a torch.Tensor, got \[1\]"),
        (({"a": torch.zeros(2)}, ONE, ("p", "p")), ValueError, "keys must be 2 distinct ones"),
        (({"a": torch.zeros(2)}, ONE, ("p",)), ValueError, "keys must be 2 distinct ones"),
    ],
)
def test_conditions_that_do_not_fit(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Conditions(*arguments)


def test_conditions_of_other_queries_are_refused(x0) -> None:
    conditions = conditions_of("prompts", ROW)
    engine = Engine(bank_of(MODELS["prompts"]()), PROTOCOL, SHAPE, conditions=conditions, batch_size=8)
    with pytest.raises(ValueError, match="conditions must be those of 3 queries, got those of 4"):
        engine.queries(x0[:3], IDS[:3], conditions=conditions)
