"""The registration of `group_norm_silu` with torch.library: its schema, its fake, and one graph without a break."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from group_norm_silu_cases import channels_last, make, make_vectors
from guda_fast import _backends, ops
from guda_fast.ops import _looks

NAMES = ("weight", "bias", "model_index", "addend", "scale", "shift")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def arguments(
    x: Tensor, models: int | None, silu: bool, backend: str = "auto"
) -> tuple[Tensor | int | float | bool | str | None, ...]:
    vectors = make_vectors(*x.shape[:2], models)
    return (x, 3, *(vectors.get(name) for name in NAMES), 1e-5, silu, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("models", [None, 2])
def test_opcheck(dtype: torch.dtype, models: int | None) -> None:
    x, *rest = arguments(make(3, 6, (4, 5)), models, silu=models is None)
    assert isinstance(x, Tensor)
    rest = [
        v.double() if dtype == torch.float64 and isinstance(v, Tensor) and v.is_floating_point() else v for v in rest
    ]
    torch.library.opcheck(torch.ops.guda_fast.group_norm_silu.default, (x.to(dtype), *rest))
    torch.library.opcheck(torch.ops.guda_fast.group_norm_silu.default, (x, 2, *[None] * 6, 0.0, True, "auto"))


@pytest.mark.skipif(_backends.native() is None, reason="what is remembered are calls of the extension")
def test_a_node_of_a_graph_is_validated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    op, checked = sys.modules["guda_fast.ops.group_norm_silu"], []
    check = op._checked
    monkeypatch.setattr(op, "_checked", lambda *given: checked.append(given) or check(*given))
    monkeypatch.setattr(op, "_CPP_CALLS", _looks.Remembered())
    for _ in range(3):
        torch.ops.guda_fast.group_norm_silu.default(make(3, 6, (4, 5)), 3, *[None] * 6, 1e-5, True, "auto")
    assert len(checked) == 1


LAYOUTS = {
    "channels-last": lambda x: x,
    "contiguous": lambda x: x.contiguous(),
    "some channels": lambda x: channels_last(torch.cat((x, x, x), 1))[:, 6:12],
    "some rows": lambda x: channels_last(torch.stack((x, x), 1).flatten(0, 1))[::2],
    "one row many times": lambda x: x[:1].expand(3, -1, -1, -1),
    "one pixel many times": lambda x: x[..., :1, :1].expand(-1, -1, 4, 5),
    "part of the pixels": lambda x: x[..., 1:3],
    "rows inside": lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    "tokens": lambda x: x.flatten(2),
    "vectors": lambda x: x[..., 0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_fake_has_the_layout_of_the_result(layout: str) -> None:
    x = LAYOUTS[layout](make(3, 6, (4, 5)))
    op = torch.ops.guda_fast.group_norm_silu.default
    rest = (3, *[None] * 6, 1e-5, True, "auto")
    with FakeTensorMode() as mode:
        fake = op(mode.from_tensor(x), *rest)
    assert fake.stride() == op(x, *rest).stride()
    compiled = torch.compile(lambda x: ops.group_norm_silu(x, 3) * 2, fullgraph=True, backend="aot_eager")
    expected = ops.group_norm_silu(x, 3) * 2
    assert torch.equal(compiled(x), expected)
    assert compiled(x).stride() == expected.stride()


@pytest.mark.parametrize("models", [None, 2])
def test_compiles_into_one_graph(backend: str, models: int | None) -> None:
    def norm(x: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        return ops.group_norm_silu(x + 1, 4, **vectors) * 2

    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    for rows in (3, 4, 7):
        x, vectors = make(rows, 12, (4, 5)), make_vectors(rows, 12, models)
        assert torch.equal(compiled(x, vectors), norm(x, vectors))
        assert compiled(x, vectors).stride() == x.stride()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inside Inductor
def test_inductor_passes_channels_last_on() -> None:
    def norm(x: Tensor) -> Tensor:
        return ops.group_norm_silu(x * 2, 4) + x

    x = make(2, 12, (4, 5))
    result = torch.compile(norm, fullgraph=True)(x)
    torch.testing.assert_close(result, norm(x))
    assert result.stride() == x.stride()


def test_compiled_results_carry_no_gradient() -> None:
    compiled = torch.compile(lambda x, w: ops.group_norm_silu(x, 2, w), fullgraph=True, backend="aot_eager")
    assert not compiled(make(2, 4, (3,)).requires_grad_(), torch.ones(4, requires_grad=True)).requires_grad


def test_validation_and_choice_happen_when_the_graph_runs() -> None:
    compiled = torch.compile(lambda x, **v: ops.group_norm_silu(x, 3, **v), fullgraph=True, backend="aot_eager")
    x, vectors = make(3, 6, (4, 5)), make_vectors(3, 6, models=2)
    with _backends.use_backend("reference"):
        assert torch.equal(compiled(x, **vectors), ops.group_norm_silu(x, 3, **vectors))
    with pytest.raises(ValueError, match=r"group_norm_silu: model_index must be in \[0, 2\), got 2 at row 0"):
        compiled(x, **{**vectors, "model_index": torch.full((3,), 2)})


def test_eager_calls_bypass_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("the registered op ran")

    monkeypatch.setattr(sys.modules["guda_fast.ops.group_norm_silu"], "_NODE", never)
    ops.group_norm_silu(make(3, 6, (4, 5)), 3)
