"""The registrations with torch.library: schemas, fakes, and one graph without a break for each op."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from guda_fast import _backends, ops
from guda_fast.ops import _library

MakeRows = Callable[..., tuple[Tensor, ...]]
SHAPE = (3, 5, 2)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def predictions_for(rows: int) -> Tensor:
    return torch.randn((2, rows, *SHAPE), generator=torch.Generator().manual_seed(0))


def test_opcheck_add_noise(make_rows: MakeRows) -> None:
    rows = make_rows(4, SHAPE)
    torch.library.opcheck(torch.ops.guda_fast.add_noise.default, (*rows, -5, True, "auto"))
    out = torch.empty(4, *SHAPE)
    torch.library.opcheck(torch.ops.guda_fast.add_noise_out.default, (*rows, 5, False, out, "reference"))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck_denoising_error(make_rows: MakeRows, paired: bool, dtype: torch.dtype) -> None:
    tensors = (predictions_for(4).to(dtype), *make_rows(4, SHAPE), torch.ones(4).double())
    torch.library.opcheck(torch.ops.guda_fast.denoising_error.default, (*tensors, 7, False, paired, "auto"))


@pytest.mark.parametrize("seed", [3, 2**63 + 11, 2**64 - 1])
def test_add_noise_compiles_into_one_graph(backend: str, make_rows: MakeRows, seed: int) -> None:
    compiled = torch.compile(lambda *rows: ops.add_noise(*rows, seed=seed) * 2, fullgraph=True, backend="aot_eager")
    for count in (4, 7, 9):
        rows = make_rows(count, SHAPE)
        assert torch.equal(compiled(*rows), ops.add_noise(*rows, seed=seed) * 2)


def test_add_noise_writes_to_out_in_a_graph(backend: str, make_rows: MakeRows) -> None:
    rows, out = make_rows(4, SHAPE), torch.full((4, *SHAPE), torch.nan)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def noised(out: Tensor, *rows: Tensor) -> Tensor:
        return ops.add_noise(*rows, seed=1, antithetic=True, out=out) + 1

    result = noised(out, *rows)
    assert torch.equal(out, ops.add_noise(*rows, seed=1, antithetic=True))
    assert torch.equal(result, out + 1)


@pytest.mark.parametrize("paired", [False, True])
def test_denoising_error_compiles_into_one_graph(backend: str, make_rows: MakeRows, paired: bool) -> None:
    compiled = torch.compile(
        lambda *tensors: ops.denoising_error(*tensors, seed=2**63, paired=paired), fullgraph=True, backend="aot_eager"
    )
    for count in (4, 7, 9):
        tensors = (predictions_for(count), *make_rows(count, SHAPE), torch.ones(count).double())
        result, expected = compiled(*tensors), ops.denoising_error(*tensors, seed=2**63, paired=paired)
        assert isinstance(result, ops.DenoisingError)
        assert torch.equal(result.errors, expected.errors)
        assert (result.paired is None) is not paired
        if paired:
            assert torch.equal(result.paired, expected.paired)


def test_compiled_results_carry_no_gradient(make_rows: MakeRows) -> None:
    x0, *vectors = make_rows(4, SHAPE)
    compiled = torch.compile(lambda *rows: ops.add_noise(*rows, seed=1), fullgraph=True, backend="aot_eager")
    assert not compiled(x0.requires_grad_(), *vectors).requires_grad
    predictions = predictions_for(4).requires_grad_()
    scored = torch.compile(lambda *t: ops.denoising_error(*t, seed=1), fullgraph=True, backend="aot_eager")
    assert not scored(predictions, x0, *vectors, torch.ones(4).double()).errors.requires_grad


def test_validation_and_choice_happen_when_the_graph_runs(make_rows: MakeRows) -> None:
    compiled = torch.compile(lambda *rows: ops.add_noise(*rows, seed=1), fullgraph=True, backend="aot_eager")
    x0, index, *vectors = make_rows(4, SHAPE)
    with _backends.use_backend("reference"):
        expected = ops.add_noise(x0, index, *vectors, seed=1)
        assert torch.equal(compiled(x0, index, *vectors), expected)
    with pytest.raises(ValueError, match=r"add_noise: query_index must be in \[0, 3\), got 3 at row 0"):
        compiled(x0, index * 0 + 3, *vectors)


def test_eager_calls_bypass_the_dispatcher(make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("the registered op ran")

    # The functions of the same names hide the modules.
    monkeypatch.setattr(sys.modules["guda_fast.ops.add_noise"], "_NODE", never)
    monkeypatch.setattr(sys.modules["guda_fast.ops.denoising_error"], "_NODE", never)
    rows = make_rows(4, SHAPE)
    ops.add_noise(*rows, seed=1)
    ops.denoising_error(predictions_for(4), *rows, torch.ones(4).double(), seed=1)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_seeds_pass_through_int64(seed: int) -> None:
    bits = _library.seed_to_bits(seed)
    assert -(2**63) <= bits < 2**63
    assert _library.seed_from_bits(bits) == seed


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("record", ["trace", "make_fx"])
def test_what_is_recorded_computes_again(record: str, make_rows: MakeRows) -> None:
    """A kernel's writes through pointers are in no record: the registered op is."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x0, *vectors = make_rows(2, (3, 4))

    def noised(x0: Tensor) -> Tensor:
        return ops.add_noise(x0, *vectors, seed=3) + 0

    recorded = torch.jit.trace(noised, (x0,)) if record == "trace" else make_fx(noised)(x0)
    assert torch.equal(recorded(x0 + 1), noised(x0 + 1))
    x = x0[:, :, None, :].to(memory_format=torch.channels_last)

    def normed(x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, 3) + 0

    recorded = torch.jit.trace(normed, (x,)) if record == "trace" else make_fx(normed)(x)
    assert torch.equal(recorded(2 * x), normed(2 * x))
