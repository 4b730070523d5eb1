"""The registration of `attention` with torch.library: its schema, its fake, and one graph without a break."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attention_cases import make
from guda_fast import _backends, ops


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_opcheck(dtype: torch.dtype, scale: float | None) -> None:
    inputs = tuple(tensor.to(dtype) for tensor in make(2, 3, 10, 5, 8))
    torch.library.opcheck(torch.ops.guda_fast.attention.default, (*inputs, scale, "auto"))


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 10, 5, 8), (1, 3, 1, 5, 8), (2, 3, 10, 0, 8), (1, 1, 9, 1, 1)])
def test_the_fake_has_the_layout_of_the_result(shape: tuple[int, ...], contiguous: bool, backend: str) -> None:
    inputs = [tensor.contiguous() if contiguous else tensor for tensor in make(*shape)]
    op = torch.ops.guda_fast.attention.default
    with FakeTensorMode() as mode:
        fake = op(*map(mode.from_tensor, inputs), None, backend)
    assert fake.stride() == op(*inputs, None, backend).stride()


def test_compiles_into_one_graph(backend: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q + 1, k, v, scale=0.3).transpose(1, 2).flatten(2) * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for rows in (2, 3, 5):
        inputs = make(rows, 2, 18, 11, 8)
        assert torch.equal(compiled(*inputs), attend(*inputs))
        assert compiled(*inputs).stride() == attend(*inputs).stride()


def test_compiled_results_carry_no_gradient() -> None:
    compiled = torch.compile(lambda q, k, v: ops.attention(q, k, v), fullgraph=True, backend="aot_eager")
    q, k, v = make(1, 2, 9, 5, 8)
    assert not compiled(q.requires_grad_(), k, v).requires_grad


def test_validation_and_choice_happen_when_the_graph_runs() -> None:
    compiled = torch.compile(lambda *qkv: ops.attention(*qkv), fullgraph=True, backend="aot_eager")
    inputs = make(1, 2, 9, 5, 8)
    with _backends.use_backend("reference"):
        assert torch.equal(compiled(*inputs), ops.attention(*inputs))
    with _backends.use_backend("triton"), pytest.raises(_backends.BackendUnavailableError, match="no such backend"):
        compiled(*inputs)


def test_eager_calls_bypass_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("the registered op ran")

    monkeypatch.setattr(sys.modules["guda_fast.ops.attention"], "_NODE", never)
    ops.attention(*make(1, 2, 9, 5, 8))
