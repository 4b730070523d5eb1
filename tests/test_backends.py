"""How a backend is chosen, refused and explained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from guda_fast import _backends, ops
from guda_fast.errors import BackendUnavailableError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Request:
    device: torch.device = CPU
    supported: bool = True


def make_op(fast_available: str | None = None, fast_run: Callable[[Request], str] | None = None) -> _backends.Op:
    fast = _backends.Backend(
        "cpp",
        fast_run or (lambda request: "ran cpp"),
        lambda request: None if request.supported else "the request is odd",
        lambda: fast_available,
        lambda: "wide",
    )
    plain = _backends.Backend("reference", lambda request: "ran reference")
    return _backends.Op("toy", Request, {"cpu": (fast, plain), "*": (plain,)})


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUDA_FAST_BACKEND", raising=False)


def test_auto_takes_the_first_without_a_reason() -> None:
    op = make_op()
    assert op.run(Request(), "auto") == "ran cpp"
    assert op.run(Request(supported=False), "auto") == "ran reference"
    assert make_op("not built").run(Request(), "auto") == "ran reference"
    assert op.run(Request(torch.device("meta")), "auto") == "ran reference"


def test_a_named_backend_runs_or_raises() -> None:
    op = make_op()
    assert op.run(Request(), "reference") == "ran reference"
    assert op.run(Request(), "cpp") == "ran cpp"
    with pytest.raises(
        BackendUnavailableError, match="toy: backend asked by backend= cannot run: cpp: the request is odd"
    ):
        op.run(Request(supported=False), "cpp")
    with pytest.raises(BackendUnavailableError, match="cannot run: cpp: not built"):
        make_op("not built").run(Request(), "cpp")
    with pytest.raises(BackendUnavailableError, match="cannot run: cpp: it does not serve meta tensors"):
        op.run(Request(torch.device("meta")), "cpp")


def test_auto_raises_every_reason_where_nothing_can_run() -> None:
    never = _backends.Backend("cpp", lambda request: "ran", lambda request: "never")
    op = _backends.Op("toy", Request, {"*": (never,)})
    with pytest.raises(BackendUnavailableError, match="toy: no backend can run this call: cpp: never"):
        op.run(Request(), "auto")


def test_argument_before_context_before_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    op = make_op()
    monkeypatch.setenv("GUDA_FAST_BACKEND", "reference")
    assert op.run(Request(), "auto") == "ran reference"
    with _backends.use_backend("cpp"):
        assert op.run(Request(), "auto") == "ran cpp"
        assert op.run(Request(), "reference") == "ran reference"
        with _backends.use_backend("reference"):
            assert op.run(Request(), "auto") == "ran reference"
        assert op.run(Request(), "auto") == "ran cpp"
    with _backends.use_backend("auto"):
        assert op.run(Request(), "auto") == "ran cpp"
    assert op.run(Request(), "auto") == "ran reference"
    monkeypatch.setenv("GUDA_FAST_BACKEND", "")
    assert op.run(Request(), "auto") == "ran cpp"


def test_use_backend_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), _backends.use_backend("reference"):
        raise KeyError
    assert make_op().run(Request(), "auto") == "ran cpp"


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = "must be one of 'auto', 'cpp', 'triton', 'cuda', 'torch', 'reference', got 'fpga'"
    with pytest.raises(ValueError, match=f"use_backend: name {choices}"):
        _backends.use_backend("fpga").__enter__()
    with pytest.raises(ValueError, match=f"toy: backend {choices}"):
        make_op().run(Request(), "fpga")
    monkeypatch.setenv("GUDA_FAST_BACKEND", "fpga")
    with pytest.raises(ValueError, match=r"toy: backend \(from GUDA_FAST_BACKEND\) must be one of .* got 'fpga'"):
        make_op().run(Request(), "auto")


def test_an_exception_inside_a_backend_propagates() -> None:
    def fail(request: Request) -> str:
        raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError, match="inside"):
        make_op(fast_run=fail).run(Request(), "auto")


def test_explain() -> None:
    op, auto, named = (make_op(), _backends.Choice("auto", "default"), _backends.Choice("cpp", "use_backend"))
    assert op.explain(Request(), auto) == (
        "toy on cpu: cpp\n  cpp        chosen (first in order; wide)\n  reference  available"
    )
    assert op.explain(Request(supported=False), auto) == (
        "toy on cpu: reference\n  cpp        unavailable: the request is odd\n  reference  chosen (first in order)"
    )
    assert op.explain(Request(), named) == (
        "toy on cpu: cpp\n  cpp        chosen (asked by use_backend; wide)\n  reference  available"
    )
    assert op.explain(Request(supported=False), named) == (
        "toy on cpu: none (cpp asked by use_backend raises BackendUnavailableError)\n"
        "  cpp        unavailable: the request is odd\n  reference  available"
    )
    assert op.explain(Request(torch.device("meta")), named).startswith("toy on meta: none (cpp asked by")


def test_explain_takes_the_arguments_of_the_op(backend: str, make_rows: Callable) -> None:
    rows = make_rows(2, (3,))
    text = _backends.explain("add_noise", *rows, seed=0)
    assert text.startswith(f"add_noise on cpu: {backend}\n")
    assert f"{backend:10} chosen (asked by use_backend" in text
    text = _backends.explain("add_noise", *rows, seed=0, backend="reference")
    assert "reference  chosen (asked by backend=)" in text
    predictions, weight = torch.zeros(1, 2, 3), torch.ones(2).double()
    text = _backends.explain("denoising_error", predictions, *rows, weight, seed=0, paired=True)
    assert text.startswith(f"denoising_error on cpu: {backend}\n")


def test_explain_does_not_run_but_validates(make_rows: Callable) -> None:
    rows = make_rows(2, (3,))
    out = torch.full((2, 3), 7.0)
    _backends.explain("add_noise", *rows, seed=0, out=out)
    assert (out == 7).all()
    with pytest.raises(ValueError, match="add_noise: seed must be between"):
        _backends.explain("add_noise", *rows, seed=-1)
    with pytest.raises(ValueError, match="explain: op must be one of 'add_noise', .* got 'matmul'"):
        _backends.explain("matmul", *rows)


def test_float64_is_explained(make_rows: Callable) -> None:
    text = _backends.explain("add_noise", *make_rows(2, (3,), dtype=torch.float64), seed=0)
    assert text.startswith("add_noise on cpu: reference\n  cpp        unavailable: ")
    if _backends.native() is not None:
        assert "x0 is float64, and cpp computes in float32" in text


def test_without_the_extension_the_reference_serves(monkeypatch: pytest.MonkeyPatch, make_rows: Callable) -> None:
    expected = ops.add_noise(*make_rows(2, (3,)), seed=0, backend="reference")
    monkeypatch.setattr(_backends, "native", lambda: None)
    assert torch.equal(ops.add_noise(*make_rows(2, (3,)), seed=0), expected)
    with pytest.raises(BackendUnavailableError, match=r"cpp: the extension guda_fast\._C was not built"):
        ops.add_noise(*make_rows(2, (3,)), seed=0, backend="cpp")
    with pytest.raises(BackendUnavailableError, match=r"use_instruction_set: the extension guda_fast\._C was not"):
        _backends.use_instruction_set("baseline").__enter__()
    reasons = {(line.op, line.device, line.backend): line.reason for line in _backends.availability()}
    assert "was not built" in str(reasons["add_noise", "cpu", "cpp"])
    assert reasons["denoising_error", "*", "reference"] is None


def test_a_missing_extension_is_found_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert _backends.native.__wrapped__() is None


def test_a_backend_that_an_op_lacks_is_said_so() -> None:
    op = make_op()
    with pytest.raises(BackendUnavailableError, match="asked by backend= cannot run: cuda: toy has no such backend"):
        op.run(Request(), "cuda")
    text = op.explain(Request(), _backends.Choice("cuda", "use_backend"))
    assert "\n  cuda: toy has no such backend\n" in text


@pytest.mark.parametrize(
    "op", ["add_noise", "conv3x3", "denoising_error", "group_norm_silu", "delta_linear", "delta_conv2d"]
)
def test_explain_refuses_what_the_op_would(op: str) -> None:
    with pytest.raises(TypeError, match=f"explain: {op}: missing a required argument: '(x|x0|predictions)'"):
        _backends.explain(op)
    with pytest.raises(TypeError, match=f"explain: {op}: got an unexpected keyword argument 'sed'|missing a required"):
        _backends.explain(op, *[torch.ones(2, 2)] * 2, sed=1)


def test_availability_knows_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons = {(line.op, line.device, line.backend): line.reason for line in _backends.availability()}
    assert reasons["add_noise", "cuda", "reference"] == "PyTorch finds no CUDA device"
    assert "triton" in str(reasons["add_noise", "cpu", "triton"])


def test_use_instruction_set_restores() -> None:
    native = _backends.native()
    if native is None:
        pytest.skip(str(_backends.native_unavailable()))
    before = native.instruction_set()
    for name in native.instruction_sets():
        with _backends.use_instruction_set(name):
            assert native.instruction_set() == name
            assert _backends.native_detail() == name
        with pytest.raises(KeyError), _backends.use_instruction_set(name):
            raise KeyError
        assert native.instruction_set() == before
    with pytest.raises(ValueError, match="baseline"):
        _backends.use_instruction_set("mmx").__enter__()
    assert native.instruction_set() == before
