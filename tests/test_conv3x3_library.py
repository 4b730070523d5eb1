"""The registration of `conv3x3` with torch.library: its schema, its fake, and one graph without a break."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from conv3x3_cases import make
from guda_fast import _backends, ops


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck(dtype: torch.dtype, biased: bool) -> None:
    x, weight, bias = make(4, 16, 32, 8, 8, dtype)
    torch.library.opcheck(torch.ops.guda_fast.conv3x3.default, (x, weight, bias if biased else None, "auto"))


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("shape", [(4, 16, 32, 8, 8), (1, 16, 32, 1, 1), (2, 1, 3, 4, 4), (0, 16, 32, 4, 4)])
def test_the_fake_has_the_layout_of_the_result(shape: tuple[int, ...], contiguous: bool, backend: str) -> None:
    x, weight, bias = make(*shape)
    x = x.contiguous() if contiguous else x
    op = torch.ops.guda_fast.conv3x3.default
    with FakeTensorMode() as mode:
        fake = op(mode.from_tensor(x), mode.from_tensor(weight), mode.from_tensor(bias), backend)
    assert fake.stride() == op(x, weight, bias, backend).stride()


def test_compiles_into_one_graph() -> None:
    def blocks(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.conv3x3(x + 1, weight, bias).relu() * 2

    compiled = torch.compile(blocks, fullgraph=True, backend="aot_eager")
    for rows in (4, 5, 8):
        inputs = make(rows, 32, 32, 8, 8)
        assert torch.equal(compiled(*inputs), blocks(*inputs))
        assert compiled(*inputs).stride() == blocks(*inputs).stride()


def test_compiled_results_carry_no_gradient() -> None:
    compiled = torch.compile(lambda x, weight: ops.conv3x3(x, weight), fullgraph=True, backend="aot_eager")
    x, weight, _ = make(4, 16, 32, 8, 8)
    assert not compiled(x.requires_grad_(), weight.requires_grad_()).requires_grad


def test_validation_and_choice_happen_when_the_graph_runs() -> None:
    compiled = torch.compile(lambda x, weight: ops.conv3x3(x, weight), fullgraph=True, backend="aot_eager")
    x, weight, _ = make(4, 16, 32, 8, 8)
    with _backends.use_backend("reference"):
        assert torch.equal(compiled(x, weight), ops.conv3x3(x, weight))
    assert torch.equal(compiled(x, weight), ops.conv3x3(x, weight, backend="cpp"))
