"""The noise ops on a GPU, `cuda` and `triton` beside each other: bits of cpp, layouts, streams, graphs, devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from guda_fast import _backends, ops, reference
from guda_fast.errors import BackendUnavailableError
from noise_cases import DTYPES, SHAPES, layouts

MakeRows = Callable[..., tuple[Tensor, ...]]

UNIT = 2.0**-24
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(params=["cuda", "triton"])
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once for each backend that has kernels for a GPU."""
    reason = _backends.cuda_unavailable() if request.param == "cuda" else _backends.triton_unavailable()
    if reason is not None:
        pytest.skip(reason)
    with _backends.use_backend(request.param):
        yield request.param


def on(device: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


def make_predictions(models: int, rows: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((models, rows, *shape), generator=torch.Generator().manual_seed(models)).to(dtype)


def make_weight(rows: int) -> Tensor:
    return torch.arange(1, rows + 1, dtype=torch.float64) / 3


def assert_errors(result: ops.DenoisingError, expected: ops.DenoisingError, backend: str) -> None:
    """cuda has the bits of cpp; triton adds up to sixteen squares in float32 first (docs/kernels.md)."""
    assert result.errors.device.type == "cuda"
    relative = 0.0 if backend == "cuda" else 16.1 * UNIT
    assert ((result.errors.cpu() - expected.errors).abs() <= relative * expected.errors).all()
    if expected.paired is None:
        assert result.paired is None
        return
    assert result.paired is not None
    if backend == "cuda":
        assert torch.equal(result.paired.cpu(), expected.paired)
    # |p_m - p_0| (|p_m - target| + |p_0 - target|) <= 2 (p_m - target)^2 + 2 (p_0 - target)^2
    size = 2 * (expected.errors + expected.errors[:1])
    assert ((result.paired.cpu() - expected.paired).abs() <= 17.1 * UNIT * size).all()


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("antithetic", [False, True])
def test_add_noise_in_every_layout(gpu: str, make_rows: MakeRows, shape: tuple[int, ...], antithetic: bool) -> None:
    x0, *vectors = make_rows(3, shape)
    vectors[4][1] = 0
    draw = {"seed": 2**64 - 3, "antithetic": antithetic}
    expected = ops.add_noise(x0, *vectors, **draw, backend="cpp")
    rows = on("cuda", *vectors)
    for name, view in layouts(x0.cuda(), 1).items():
        result = ops.add_noise(view, *rows, **draw)
        assert result.is_contiguous()
        assert torch.equal(result.cpu(), expected), name
    for name, out in layouts(torch.zeros_like(expected, device="cuda"), 1).items():
        out.fill_(torch.nan)
        assert ops.add_noise(x0.cuda(), *rows, **draw, out=out) is out
        assert torch.equal(out.cpu(), expected), name


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_denoising_error_in_every_layout(
    gpu: str, make_rows: MakeRows, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensors, weight, predictions = make_rows(3, shape), make_weight(3), make_predictions(5, 3, shape, dtype)
    expected = ops.denoising_error(predictions, *tensors, weight, seed=7, paired=True, backend="cpp")
    x0, *vectors = on("cuda", *tensors, weight)
    contiguous = ops.denoising_error(predictions.cuda(), x0, *vectors, seed=7, paired=True)
    assert_errors(contiguous, expected, gpu)
    for name, view in layouts(predictions.cuda(), 2).items():
        result = ops.denoising_error(view, x0, *vectors, seed=7, paired=True)
        assert torch.equal(result.errors, contiguous.errors), name
        assert torch.equal(result.paired, contiguous.paired), name
        assert torch.equal(ops.denoising_error(view, x0, *vectors, seed=7).errors, contiguous.errors), name
    for name, view in layouts(x0, 1).items():
        result = ops.denoising_error(predictions.cuda(), view, *vectors, seed=7)
        assert torch.equal(result.errors, contiguous.errors), name


@needs_gpu
def test_a_million_normals_are_within_the_contract(gpu: str, make_rows: MakeRows) -> None:
    tensors = make_rows(4, (250_001,))
    result = ops.add_noise(*on("cuda", *tensors), seed=5).cpu()
    assert torch.equal(result, ops.add_noise(*tensors, seed=5, backend="cpp"))
    exact = reference.add_noise(*tensors, seed=5, dtype=torch.float64)
    assert (result.double() - exact).abs().max() <= 4e-6 + 2.1 * UNIT * (exact.abs().max() + 6)


@needs_gpu
@pytest.mark.parametrize("models", [1, 2, 7, 8, 9, 17, 33])
def test_models_and_rows_change_no_bit(gpu: str, make_rows: MakeRows, models: int) -> None:
    """Past the models that one thread block takes at once, and with rows in another order."""
    shape = (3, 37, 41)
    tensors, weight, predictions = make_rows(5, shape), make_weight(5), make_predictions(33, 5, shape)
    expected = ops.denoising_error(predictions, *tensors, weight, seed=8, paired=True, backend="cpp")
    x0, *vectors = on("cuda", *tensors, weight)
    everything = ops.denoising_error(predictions.cuda(), x0, *vectors, seed=8, paired=True)
    assert_errors(everything, expected, gpu)
    some = ops.denoising_error(predictions[:models].cuda(), x0, *vectors, seed=8, paired=True)
    assert torch.equal(some.errors, everything.errors[:models])
    assert torch.equal(some.paired, everything.paired[:models])
    order = torch.tensor([3, 0, 4], device="cuda")
    part = ops.denoising_error(predictions.cuda()[:, order], x0, *(v[order] for v in vectors), seed=8, paired=True)
    assert torch.equal(part.errors, everything.errors[:, order])
    assert torch.equal(part.paired, everything.paired[:, order])


@needs_gpu
def test_offsets_beyond_32_bits(gpu: str, make_rows: MakeRows) -> None:
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of free GPU memory")
    tensors, weight, predictions = make_rows(2, (6,), queries=2), make_weight(2), make_predictions(3, 2, (6,))
    x0, *vectors = on("cuda", *tensors)
    expected = ops.denoising_error(predictions.cuda(), x0, *vectors, weight.cuda(), seed=1)
    noisy = ops.add_noise(x0, *vectors, seed=1)
    far = torch.empty(2**31 + 64, device="cuda")
    view = far.as_strided((3, 2, 6), (2**30, 32, 1)).copy_(predictions)
    result = ops.denoising_error(view, x0, *vectors, weight.cuda(), seed=1)
    assert torch.equal(result.errors, expected.errors)
    assert torch.equal(ops.add_noise(far.as_strided((2, 6), (2**31, 2)).copy_(x0), *vectors, seed=1), noisy)
    out = far.as_strided((2, 6), (2**31, 3)).fill_(torch.nan)
    assert torch.equal(ops.add_noise(x0, *vectors, seed=1, out=out), noisy)


@needs_gpu
@pytest.mark.parametrize(("models", "count", "shape"), [(2, 0, (4,)), (2, 3, (0, 4)), (0, 3, (4,))])
def test_empty(gpu: str, make_rows: MakeRows, models: int, count: int, shape: tuple[int, ...]) -> None:
    rows = on("cuda", *make_rows(count, shape))
    predictions, weight = make_predictions(models, count, shape).cuda(), make_weight(count).cuda()
    result = ops.denoising_error(predictions, *rows, weight, seed=0, paired=True)
    zero = torch.zeros(models, count, dtype=torch.float64, device="cuda")
    assert torch.equal(result.errors, zero)
    assert torch.equal(result.paired, zero)
    assert ops.add_noise(*rows, seed=0).shape == (count, *shape)


@needs_gpu
def test_what_is_no_number_stays_in_its_cell(gpu: str, make_rows: MakeRows) -> None:
    x0, *vectors = on("cuda", *make_rows(3, (70,)))
    vectors[4][0] = 0
    weight, predictions = make_weight(3).cuda(), make_predictions(2, 3, (70,)).cuda()
    clean = ops.denoising_error(predictions, x0, *vectors, weight, seed=1).errors
    predictions[1, 2, 69] = torch.nan
    result = ops.denoising_error(predictions, x0, *vectors, weight, seed=1).errors
    assert result[1, 2].isnan()
    result[1, 2] = clean[1, 2]
    assert torch.equal(result, clean)
    unread = ops.denoising_error(predictions, x0 * torch.nan, *vectors, weight, seed=1).errors
    assert torch.equal(unread[:, 0], clean[:, 0])
    assert unread[:, 1:].isnan().all()


@needs_gpu
@pytest.mark.parametrize("gpu", ["cuda"], indirect=True)  # triton squares in float32, which does not hold them all
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_value_is_widened_exactly(gpu: str, dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    rows = len(values)
    zeros, one = torch.zeros(rows, dtype=torch.int64, device="cuda"), torch.ones(rows, device="cuda")
    result = ops.denoising_error(
        values.view(1, -1, 1).cuda(), torch.zeros(1, 1, device="cuda"), zeros, zeros, zeros, zeros, one, 0 * one,
        one.double(), seed=0,
    )  # fmt: skip
    assert_errors(result, ops.DenoisingError(values.double().square().view(1, -1), None), gpu)


@needs_gpu
def test_the_current_stream_is_used(gpu: str, make_rows: MakeRows) -> None:
    """Inputs that a slow stream makes late are read after it made them, and the default stream is not waited for."""
    tensors, weight, predictions = make_rows(3, (4097,)), make_weight(3), make_predictions(2, 3, (4097,))
    x0, *vectors = on("cuda", *tensors, weight)
    expected = ops.denoising_error(predictions.cuda(), x0, *vectors, seed=3)
    noisy = ops.add_noise(x0, *vectors[:-1], seed=3)
    stream, late, final = torch.cuda.Stream(), torch.full_like(x0, torch.nan), predictions.cuda()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x0)
        result = ops.denoising_error(final, late, *vectors, seed=3)
        out = ops.add_noise(late, *vectors[:-1], seed=3)
    stream.synchronize()
    assert torch.equal(result.errors, expected.errors)
    assert torch.equal(out, noisy)


@needs_gpu
def test_a_cuda_graph_replays_with_new_contents(gpu: str, make_rows: MakeRows) -> None:
    """The grid and every address are those of the capture; what lies there is read at each replay."""
    shape = (3, 40, 40)
    x0, *vectors = on("cuda", *make_rows(4, shape), make_weight(4))
    predictions = make_predictions(3, 4, shape).cuda()
    out = torch.full((4, *shape), torch.nan, device="cuda")
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        ops.add_noise(x0, *vectors[:-1], seed=3, out=out)
        ops.denoising_error(predictions, x0, *vectors, seed=3, paired=True)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.add_noise(x0, *vectors[:-1], seed=3, out=out)
        result = ops.denoising_error(predictions, x0, *vectors, seed=3, paired=True)
    for shift in (1, 2):
        x0.mul_(0.5)
        predictions.neg_()
        for position, vector in enumerate(vectors):
            vectors[position].copy_(vector.roll(shift))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, ops.add_noise(x0, *vectors[:-1], seed=3))
        expected = ops.denoising_error(predictions, x0, *vectors, seed=3, paired=True)
        assert torch.equal(result.errors, expected.errors)
        assert torch.equal(result.paired, expected.paired)


@needs_two
def test_another_device_than_the_current_one(gpu: str, make_rows: MakeRows) -> None:
    tensors, weight, predictions = make_rows(3, (4097,)), make_weight(3), make_predictions(2, 3, (4097,))
    expected = ops.denoising_error(predictions, *tensors, weight, seed=3, backend="cpp")
    x0, *vectors = on("cuda:1", *tensors, weight)
    with torch.cuda.device(0):
        result = ops.denoising_error(predictions.to("cuda:1"), x0, *vectors, seed=3)
        noisy = ops.add_noise(x0, *vectors[:-1], seed=3)
        assert torch.cuda.current_device() == 0
    assert result.errors.device == noisy.device == torch.device("cuda:1")
    assert_errors(result, expected, gpu)
    assert torch.equal(noisy.cpu(), ops.add_noise(*tensors, seed=3, backend="cpp"))


@needs_gpu
def test_float64_goes_to_the_reference(make_rows: MakeRows) -> None:
    rows = on("cuda", *make_rows(2, (3,), dtype=torch.float64))
    assert ops.add_noise(*rows, seed=0).dtype == torch.float64
    with pytest.raises(BackendUnavailableError, match="cuda: x0 is float64, and cuda computes in float32"):
        ops.add_noise(*rows, seed=0, backend="cuda")


def test_cuda_does_not_serve_cpu_tensors(make_rows: MakeRows) -> None:
    with pytest.raises(BackendUnavailableError, match="cuda: it does not serve cpu tensors"):
        ops.add_noise(*make_rows(2, (3,)), seed=0, backend="cuda")


class WithoutCuda:
    """An extension that was built without CUDA, or on a machine without a device."""

    def __init__(self, **status: object) -> None:
        self.status = status

    def cuda_status(self) -> dict[str, object]:
        return self.status


@pytest.mark.parametrize(
    ("extension", "reason"),
    [
        (None, "the extension guda_fast._C was not built (GUDA_FAST_NATIVE=OFF"),
        (WithoutCuda(compiled=False), "the extension guda_fast._C was built without CUDA"),
        (WithoutCuda(compiled=True, error="insufficient driver"), "no CUDA device: insufficient driver"),
    ],
    ids=["no extension", "built without CUDA", "no device"],
)  # fmt: skip
def test_why_cuda_is_unavailable(monkeypatch: pytest.MonkeyPatch, extension: object, reason: str) -> None:
    monkeypatch.setattr(_backends, "native", lambda: extension)
    assert str(_backends.cuda_unavailable.__wrapped__()).startswith(reason)


def test_cuda_is_available_where_a_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "native", lambda: WithoutCuda(compiled=True, error=""))
    assert _backends.cuda_unavailable.__wrapped__() is None


def test_order_of_backends_on_cuda_tensors() -> None:
    for op in ("add_noise", "denoising_error"):
        table = [line.backend for line in _backends.availability() if (line.op, line.device) == (op, "cuda")]
        assert table == ["triton", "cuda", "reference"]
