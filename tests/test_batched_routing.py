"""`RowModels`: which rows stand for which, and what it refuses. `BatchedModel`: which rows its layers compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guda_fast import ops
from guda_fast.deltas import DeltaBank
from guda_fast.deltas.delta import Delta, Dense, LowRank
from guda_fast.forward import _batched_layers as layers
from guda_fast.forward._routing import FACTORS, RowModels
from guda_fast.forward.batched import BatchedModel
from test_batched import Case, as_on_a_gpu, randomised, unet

CPU = torch.device("cpu")
NUMBERS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2)), max_size=12)


def columns(numbers: list[tuple[int, int, int]]) -> dict[str, list[int]]:
    model, sample, condition = ([number[i] for number in numbers] for i in range(3))
    return {"model": model, "sample": sample, "timestep": [s // 2 for s in sample], "condition": condition}


@given(NUMBERS, st.sets(st.sampled_from(FACTORS)))
def test_selected_rows_stand_for_all_rows_of_their_kind(numbers: list[tuple[int, int, int]], kind: set[str]) -> None:
    given_columns = columns(numbers)
    rows = RowModels(**given_columns)
    order, back = rows.order(CPU) or (torch.arange(len(rows)), torch.arange(len(rows)))
    ordered = {name: [values[i] for i in order] for name, values in given_columns.items()}
    assert ordered["model"] == sorted(given_columns["model"])
    assert order[back].tolist() == list(range(len(rows)))
    selection = rows.select(frozenset(kind))
    keys = list(zip(*(ordered[name] for name in kind), strict=True)) if kind else [()] * len(rows)
    assert selection.count == len(set(keys))
    chosen, inverse = selection.rows(CPU), selection.inverse(CPU)
    assert (chosen is None) == (inverse is None) == (selection.count == len(rows))
    if chosen is not None and inverse is not None:
        assert [keys[chosen[i]] for i in inverse] == keys
        assert selection.model(CPU).tolist() == [ordered["model"][i] for i in chosen]
    if "model" in kind:
        models = selection.model(CPU).tolist()
        assert models == sorted(models)
        offsets = selection.offsets(5, CPU)
        assert [models[a:b] for a, b in pairwise(offsets)] == [[m] * models.count(m) for m in range(5)]
        assert [m for segment in selection.segments for m in [segment.model] * len(models[segment.rows])] == models


def test_a_full_product_of_models_and_samples_is_one() -> None:
    product = RowModels([1, 0, 1, 0], [7, 7, 8, 8], [1, 1, 1, 1])
    assert product.crosses(frozenset({"sample"}), 2)
    assert product.crosses(frozenset({"timestep"}), 2)
    assert not product.crosses(frozenset({"sample"}), 3), "the third model has no row"
    assert not RowModels([0, 0, 1, 1], [7, 8, 7, 7], [1] * 4).crosses(frozenset({"sample"}), 2)
    assert not RowModels([0, 0, 1, 1], [7, 8, 8, 7], [1] * 4).crosses(frozenset({"sample"}), 2), "another order"


def test_rows_without_conditions_share_none() -> None:
    rows = RowModels([0, 0], [1, 1], [5, 5])
    assert rows.select(frozenset({"condition"})).count == 2
    assert rows.select(frozenset({"sample", "timestep"})).count == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": [0, -1]}, ValueError, "model must be 0 or more, got -1"),
        ({"sample": [0]}, ValueError, r"sample must have shape \(2,\), got \(1,\)"),
        ({"timestep": np.zeros((2, 1), dtype=np.int64)}, ValueError, r"timestep must have shape \(2,\)"),
        ({"condition": [0.5, 1.0]}, TypeError, "condition must be integers, got float64"),
        ({"model": torch.zeros(2, device="meta")}, ValueError, "model must be on cpu"),
    ],
)
def test_rows_that_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    right = {"model": [0, 1], "sample": [0, 1], "timestep": torch.tensor([3, 4])}
    with pytest.raises(error, match=rf"RowModels: {message}"):
        RowModels(**{**right, **change})


def bank(*, only: Callable[[str], bool] = lambda name: True, low_rank: bool = False, groups: int = 3) -> DeltaBank:
    """Deltas of the parameters whose names are said so."""
    model = randomised(unet)

    def delta(seed: int) -> Delta:
        random = torch.Generator().manual_seed(seed)
        parts: dict[str, Dense | LowRank] = {}
        for name, parameter in model.named_parameters():
            if only(name) and low_rank and parameter.dim() > 1:
                up = torch.randn(parameter.shape[0], 2, generator=random)
                parts[name] = LowRank(0.1 * up, torch.randn(2, *parameter.shape[1:], generator=random))
            elif only(name):
                parts[name] = Dense(0.1 * torch.randn(parameter.shape, generator=random))
        return Delta(parts)

    return DeltaBank.load(model, {f"g{k}": delta(k) for k in range(groups)})


def run(batched: BatchedModel, model: list[int], sample: list[int], times: list[int]) -> dict[str, int]:
    """Rows that each layer computed."""
    x = torch.randn(max(sample) + 1, 3, 8, 8, dtype=torch.float64)[sample]
    timestep = torch.tensor([times[s] for s in sample])
    batched(x, timestep, RowModels(model, sample, timestep))
    return dict(batched.computed_rows)


@contextmanager
def observed(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[list[tuple[int, bool]]]:
    """Rows of each call of an op, and whether all models shared them."""
    seen: list[tuple[int, bool]] = []
    original = getattr(ops, name)

    def watched(x: Tensor, *args: Any, offsets: Tensor | None = None, **named: Any) -> Tensor:
        seen.append((len(x), offsets is None))
        return original(x, *args, offsets=offsets, **named)

    with monkeypatch.context() as patch:
        patch.setattr(layers.ops, name, watched)
        yield seen


def test_layers_compute_what_differs() -> None:
    model, sample = [0, 0, 0, 1, 1, 1, 3, 3, 3], [0, 1, 2] * 3
    computed = run(BatchedModel(bank()), model, sample, [5, 5, 30])
    for name, rows in computed.items():
        assert rows == (6 if "time_emb" in name else 9), name
    assert len(computed) > 60


def test_layers_before_the_first_changed_one_run_once_a_sample() -> None:
    model, sample = [0, 0, 0, 1, 1, 1, 3, 3, 3], [0, 1, 2] * 3
    computed = run(BatchedModel(bank(only=lambda name: name.startswith("mid_block"))), model, sample, [5, 5, 30])
    assert computed["time_embedding.linear_1"] == computed["down_blocks.0.resnets.0.time_emb_proj"] == 2
    assert computed["mid_block.resnets.0.time_emb_proj"] == 6
    before = {name: rows for name, rows in computed.items() if name.startswith(("conv_in", "down_blocks"))}
    assert {rows for name, rows in before.items() if "time_emb" not in name} == {3}
    assert computed["mid_block.resnets.0.norm1"] == computed["mid_block.resnets.1.conv2"] == 9
    assert not any(name.startswith(("up_blocks.1.resnets.1.conv", "conv_out")) for name in computed), "not routed"


def test_the_first_layer_sees_each_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    batched = BatchedModel(bank(low_rank=True))
    with observed(monkeypatch, "delta_conv2d") as seen:
        computed = run(batched, [0, 1, 2, 3, 3, 2, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1], [5, 30])
    assert seen[0] == (2, True)
    assert computed["conv_in"] == 2
    assert all(entry == (8, False) for entry in seen[1:])
    with observed(monkeypatch, "delta_conv2d") as seen:
        computed = run(batched, [0, 1, 3, 3, 2, 1, 0], [0, 0, 0, 1, 1, 1, 1], [5, 30])
    assert seen[0] == (7, False), "model 2 lacks a sample"


def test_prompts_are_projected_once_a_model_and_prompt() -> None:
    case = Case("prompts", ["dense"], models=[0, 0, 0, 0, 1, 1, 1, 1])
    batched = BatchedModel(case.bank(), example=case.inputs(torch.float64, False))
    case.found(batched, torch.float64, False)
    keys = {name: rows for name, rows in batched.computed_rows.items() if "attn2.to_k" in name or "attn2.to_v" in name}
    assert len(keys) > 5
    assert set(keys.values()) == {4}
    queries = {rows for name, rows in batched.computed_rows.items() if "attn2.to_q" in name}
    # Before the first cross attention the three samples of each model, whatever the prompt.
    assert queries == {6, 8}


def test_fused_blocks_stay_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two norms with SiLU in each block, on the rows that differ, with each row's own parameters."""
    case = Case("attention", ["dense"], models=[0, 0, 1, 1, 2, 2])
    batched = BatchedModel(case.bank(fused=True, channels_last=True))
    seen: list[tuple[int, bool]] = []
    original = ops.group_norm_silu

    def watched(x: Tensor, *args: Any, **named: Any) -> Tensor:
        if named["silu"]:
            seen.append((len(x), named["model_index"] is not None))
        return original(x, *args, **named)

    monkeypatch.setattr(ops, "group_norm_silu", watched)
    case.found(batched, torch.float64, True)
    blocks = [name for name, _ in case.base.named_modules() if name.endswith("norm2")]
    assert seen == [(6, True)] * 2 * len(blocks)
    assert len(blocks) > 5
