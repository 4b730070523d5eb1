"""`delta_linear` on every backend: against float64 row by row, shapes, errors, torch.compile."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from delta_cases import BACKENDS, DEVICE, FORMS, INDEX, OFFSETS, Layer, here, random_layer
from guda_fast import _backends, ops, reference
from guda_fast.errors import BackendUnavailableError
from guda_fast.reference.segments import Deltas


def run(layer: Layer, offsets: Tensor | None, index: Tensor | None, backend: str = "auto") -> Tensor:
    return ops.delta_linear(
        layer.x, layer.weight, layer.bias,
        offsets=here(offsets), delta_index=here(index), backend=backend, **layer.deltas,
    )  # fmt: skip


def linear_layer(form: str, x: tuple[int, ...] = (9, 17), outputs: int = 5, **options: object) -> Layer:
    return random_layer(x, (outputs, x[-1]), form, F.linear, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offsets", [OFFSETS, None], ids=["segments", "shared"])
def test_agrees_with_float64(backend: str, form: str, dtype: torch.dtype, offsets: Tensor | None) -> None:
    layer = linear_layer(form, dtype=dtype)
    layer.check(run(layer, offsets, INDEX, backend), offsets, INDEX)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "rank 3"])
@pytest.mark.parametrize(
    ("x", "outputs", "bias"),
    [((9, 4, 6), 70, True), ((9, 2, 3, 33), 3, False), ((9, 1), 1, True), ((9, 40, 8), 4, False)],
)
def test_sizes(backend: str, form: str, x: tuple[int, ...], outputs: int, bias: bool) -> None:
    layer = linear_layer(form, x, outputs, bias=bias)
    for offsets in (OFFSETS, None):
        result = run(layer, offsets, INDEX, backend)
        assert result.is_contiguous()
        layer.check(result, offsets, INDEX)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "rank 1"])
def test_without_an_index_model_m_takes_delta_m(backend: str, form: str) -> None:
    layer = linear_layer(form)
    offsets, index = torch.tensor([0, 4, 4, 9]), torch.arange(3)
    layer.check(run(layer, offsets, None, backend), offsets, index)
    layer.check(run(layer, None, None, backend), None, index)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str) -> None:
    layer = linear_layer("dense", (0, 4, 6))
    assert run(layer, torch.zeros(7).long(), INDEX, backend).shape == (0, 4, 5)
    assert run(layer, None, INDEX, backend).shape == (6, 0, 4, 5)
    assert run(layer, torch.zeros(1).long(), torch.zeros(0).long(), backend).shape == (0, 4, 5)
    assert run(linear_layer("rank 3"), None, torch.zeros(0).long(), backend).shape == (0, 9, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "rank 3", "bias"])
@pytest.mark.parametrize("offsets", [OFFSETS, None], ids=["segments", "shared"])
def test_no_delta_or_no_feature_at_all(backend: str, form: str, offsets: Tensor | None) -> None:
    index = torch.full((6,), -1)
    layer = linear_layer(form, number=0)
    layer.check(run(layer, offsets, index, backend), offsets, index)
    nothing = linear_layer(form, (9, 0))
    nothing.check(run(nothing, offsets, INDEX, backend), offsets, INDEX)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "rank 3"])
def test_strides_change_nothing(backend: str, form: str) -> None:
    layer = linear_layer(form, (9, 4, 6))
    spread = layer.map(lambda tensor: torch.stack((tensor, tensor * torch.nan), -1)[..., 0])
    turned = layer.map(lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor)
    for other in (spread, turned):
        layer.check(run(other, OFFSETS, INDEX, backend), OFFSETS, INDEX)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_without_delta_never_reads_one(backend: str) -> None:
    for form in ("dense", "rank 3"):
        layer = linear_layer(form)
        spoiled = Layer(
            layer.x, layer.weight, layer.bias, {k: v * torch.nan for k, v in layer.deltas.items()}, F.linear
        )
        for offsets in (OFFSETS, None):
            result = run(spoiled, offsets, torch.full((6,), -1), backend)
            layer.check(result, offsets, torch.full((6,), -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["dense", "rank 3"])
@pytest.mark.parametrize("rows", [2, 90])
def test_few_and_many_rows_a_model(rows: int, form: str, dtype: torch.dtype) -> None:
    """Two ways of the reference: a second product, or the sum of weight and delta; in bfloat16 always the same."""
    layer = linear_layer(form, (3 * rows, 8), 12, dtype=dtype)
    deltas = Deltas(*(layer.deltas.get(name) for name in ("delta", "up", "down", "bias_delta")))
    assert deltas.merging_pays(layer.weight, rows) == ((rows == 90) if dtype == torch.float32 else form == "dense")
    index = torch.tensor([1, -1, 2])
    for offsets in (rows * torch.arange(4), None):
        layer.check(run(layer, offsets, index, "reference"), offsets, index)


@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_are_not_erased_in_low_precision(backend: str) -> None:
    """A delta of less than half a step of the weight, which merging would round away."""
    x, weight = torch.ones(20, 4).bfloat16(), torch.tensor([[256.0, -256.0, 256.0, -256.0]]).bfloat16()
    up, down = torch.full((1, 1, 1), 0.125).bfloat16(), torch.ones(1, 1, 4).bfloat16()
    tensors = {"x": x, "weight": weight, "offsets": torch.tensor([0, 20]), "up": up, "down": down}
    result = ops.delta_linear(**{name: tensor.to(DEVICE) for name, tensor in tensors.items()}, backend=backend)
    assert (result == 0.5).all()


def test_float64_is_computed_in_float64_by_the_reference() -> None:
    for form in FORMS:
        layer = linear_layer(form, dtype=torch.float64)
        torch.testing.assert_close(run(layer, OFFSETS, INDEX), layer.row_by_row(OFFSETS, INDEX), rtol=0, atol=1e-13)
        single = linear_layer(form)
        exact = reference.delta_linear(
            single.x,
            single.weight,
            single.bias,
            offsets=here(OFFSETS),
            delta_index=here(INDEX),
            dtype=torch.float64,
            **single.deltas,
        )
        torch.testing.assert_close(exact, single.map(Tensor.double).row_by_row(OFFSETS, INDEX), rtol=0, atol=1e-13)
        if "triton" in BACKENDS:
            with pytest.raises(BackendUnavailableError, match="triton: x is float64"):
                run(layer, OFFSETS, INDEX, "triton")


def test_results_carry_no_gradient() -> None:
    layer = linear_layer("rank 3")
    layer.weight.requires_grad_()
    assert not run(layer, OFFSETS, INDEX).requires_grad
    assert not torch.compile(run, fullgraph=True, backend="aot_eager")(layer, OFFSETS, INDEX).requires_grad


@pytest.mark.parametrize("old_way", [False, True])
def test_tf32_is_asked_for_in_the_way_that_it_was_set(old_way: bool) -> None:
    """torch 2.9 and newer raise where `allow_tf32` is read after `fp32_precision` was set."""
    setting = """
import torch
from guda_fast.ops._deltas import tf32_allowed
matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
assert [tf32_allowed(matmul), tf32_allowed(conv)] == [False, True]
if OLD_WAY:
    matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, False
else:
    matmul.fp32_precision, conv.fp32_precision = "tf32", "ieee"
assert [tf32_allowed(matmul), tf32_allowed(conv)] == [True, False]
"""
    script = setting.replace("OLD_WAY", str(old_way))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_explain() -> None:
    text = _backends.explain("delta_linear", **VALID)
    assert text.startswith("delta_linear on cpu: reference\n")


VALID = {
    "x": torch.zeros(4, 3),
    "weight": torch.zeros(2, 3),
    "bias": torch.zeros(2),
    "offsets": torch.tensor([0, 1, 4]),
    "delta": torch.zeros(3, 2, 3),
    "delta_index": torch.tensor([2, -1]),
}

INVALID = [
    ({"x": 1.0}, TypeError, r"x must be a torch.Tensor, got 1.0 \(float\)"),
    ({"x": torch.zeros(3)}, ValueError, r"x must have at least 2 dimensions"),
    ({"x": torch.zeros(4, 3).long()}, TypeError, r"x must be float32 or bfloat16 or float16 or float64, got int64"),
    ({"weight": torch.zeros(2, 4)}, ValueError, r"weight must have shape \(\*, 3\), got float32 tensor of .*4"),
    ({"weight": torch.zeros(2, 3).half()}, TypeError, r"weight must be float32, got float16"),
    ({"weight": torch.zeros(2, 3, device="meta")}, ValueError, r"weight must be on cpu"),
    ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(2,\)"),
    ({"delta": torch.zeros(3, 3, 2)}, ValueError, r"delta must have shape \(\*, 2, 3\)"),
    ({"delta": None}, ValueError, r"delta, up and down, or bias_delta must be given, got none"),
    ({"up": torch.zeros(3, 2, 1)}, ValueError, r"up and down must be given together, got only up"),
    ({"up": torch.zeros(3, 2, 1), "down": torch.zeros(3, 1, 3)}, ValueError, r"delta must be None where up and down"),
    ({"delta": None, "up": torch.zeros(3, 2, 2), "down": torch.zeros(3, 1, 3)}, ValueError,
     r"down must have shape \(3, 2, 3\)"),
    ({"delta": None, "up": torch.zeros(3, 2, 0), "down": torch.zeros(3, 0, 3)}, ValueError, r"up .* rank of at least"),
    ({"bias_delta": torch.zeros(2, 2)}, ValueError, r"bias_delta must have shape \(3, 2\)"),
    ({"offsets": torch.tensor([0, 4])}, ValueError, r"offsets must have shape \(3,\), got int64"),
    ({"offsets": torch.tensor([0, 1, 4]).int()}, TypeError, r"offsets must be int64, got int32"),
    ({"offsets": torch.tensor([0, 1, 3])}, ValueError, r"offsets must run from 0 to the 4 rows of x, got 0 to 3"),
    ({"offsets": torch.tensor([1, 1, 4])}, ValueError, r"offsets must run from 0 to the 4 rows of x, got 1 to 4"),
    ({"offsets": torch.tensor([0, 5, 4])}, ValueError, r"offsets must not fall, got 5 then 4 at segment 1"),
    ({"delta_index": torch.tensor([0, 3])}, ValueError, r"delta_index must be in \[-1, 3\), got 3 at row 1"),
    ({"delta_index": torch.tensor([-2, 0])}, ValueError, r"delta_index must be in \[-1, 3\), got -2 at row 0"),
    ({"delta_index": None}, ValueError, r"offsets must have shape \(4,\)"),
    ({"backend": "cpp"}, BackendUnavailableError, r"cannot run: cpp: delta_linear has no such backend"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), INVALID)
def test_invalid_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"delta_linear: .*{message}"):
        ops.delta_linear(**{**VALID, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["dense", "rank 3", "bias"])
@pytest.mark.parametrize("offsets", [OFFSETS, None], ids=["segments", "shared"])
def test_opcheck(form: str, offsets: Tensor | None) -> None:
    layer = linear_layer(form, (9, 2, 6))
    deltas = [layer.deltas.get(name) for name in ("delta", "up", "down", "bias_delta")]
    arguments = (layer.x, layer.weight, layer.bias, here(offsets), *deltas, here(INDEX), "reference")
    torch.library.opcheck(torch.ops.guda_fast.delta_linear.default, arguments)


def test_compiles_into_one_graph() -> None:
    layer = linear_layer("rank 3")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def double(x: Tensor) -> Tensor:
        return 2 * run(replace(layer, x=x), OFFSETS, INDEX)

    torch.testing.assert_close(double(layer.x), 2 * run(layer, OFFSETS, INDEX), rtol=0, atol=0)


def test_eager_calls_bypass_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("the registered op ran")

    # The function of the same name hides the module.
    monkeypatch.setattr(sys.modules["guda_fast.ops.delta_linear"], "_NODE", never)
    run(linear_layer("rank 3"), OFFSETS, INDEX)
