"""Captured forwards: what a replay reads, with a stand-in for CUDA graphs that runs the captured calls again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from conditional import FEATURES, MODELS, conditions_of
from guda_fast.forward._routing import Inputs
from guda_fast.forward.resident import ResidentForward


class Recorded:
    """A graph: replaying it calls the model again on the memory that it was captured with, into the same result."""

    replay: Callable[[], None]

    def pool(self) -> int:
        return 7


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    seen: list[object] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    @contextmanager
    def capture(graph: Recorded, pool: object = None, **_: Any) -> Iterator[None]:
        seen.append(pool)
        calls: list[tuple[Inputs, Any, torch.Tensor]] = []
        run = Inputs.run

        def recording(inputs: Inputs, model: Any) -> torch.Tensor:
            out = run(inputs, model)
            calls.append((inputs, model, out))
            return out

        with monkeypatch.context() as patch:
            patch.setattr(Inputs, "run", recording)
            yield
        ((inputs, model, out),) = calls
        graph.replay = lambda: out.copy_(run(inputs, model))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return seen


@torch.no_grad()
def test_a_replay_reads_every_input_of_its_batch(pools) -> None:
    model = MODELS["prompts, added"]()
    random = torch.Generator().manual_seed(0)
    conditions = conditions_of("prompts, added", [0])
    first, second, third = (
        Inputs(
            torch.randn(2, 4, 8, 8, generator=random),
            torch.randint(100, (2,), generator=random),
            conditions.take(torch.tensor(rows)),
        )
        for rows in ([0, 1], [2, 0], [1, 1])
    )
    graph = ResidentForward(model)._graph(first)
    for inputs in (first, second, third):
        torch.testing.assert_close(graph(inputs), inputs.run(model), rtol=1e-5, atol=1e-6)
    # Each alone matters, or a forgotten one would not be seen.
    expected = graph(second).clone()
    for changed in (
        second._replace(x=first.x),
        second._replace(timestep=first.timestep),
        *(second._replace(conditions={**second.conditions, name: first.conditions[name]}) for name in first.conditions),
    ):
        assert not torch.allclose(graph(changed), expected, rtol=1e-3)


@torch.no_grad()
def test_one_graph_for_each_shape_of_its_inputs(pools) -> None:
    forward = ResidentForward(MODELS["prompts"]())
    for rows, tokens in ((2, 5), (2, 7), (1, 5), (2, 5)):
        given = {"encoder_hidden_states": torch.zeros(rows, tokens, FEATURES)}
        forward._graph(Inputs(torch.zeros(rows, 4, 8, 8), torch.zeros(rows).long(), given))
    assert len(forward._graphs) == 3
    assert pools == [None, 7, 7], "graphs share their memory"
