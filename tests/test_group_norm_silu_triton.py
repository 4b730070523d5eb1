"""`group_norm_silu` in Triton: through the interpreter where there is no GPU, and compiled ahead of time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ahead_of_time import compiled
from group_norm_silu_cases import assert_within_twice_eager, channels_last, make, make_vectors
from guda_fast import _backends, ops
from guda_fast.errors import BackendUnavailableError

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("weight", "bias", "model_index", "addend", "scale", "shift")
# rows, channels, groups, positions, and how the two kernels cut a row: (groups, positions, tiles, warps)
CASES = [
    (1, 1, 1, (1,), (1, 1, 1, 1)),
    (2, 6, 3, (), (2, 1, 1, 1)),
    (2, 5, 1, (7,), (1, 4, 1, 1)),
    (2, 12, 4, (3, 5), (2, 4, 2, 1)),
    (1, 70, 7, (2, 3, 5), (4, 8, 1, 1)),
    (1, 100, 1, (9,), (1, 2, 2, 1)),
    (2, 8, 4, (4, 4), (4, 4, 2, 1)),  # no tile has an empty element
    (1, 20, 2, (9, 31), (2, 64, 2, 1)),
]
Run = Callable[..., Tensor]
# The interpreter computes with numpy, which warns of what arithmetic on a GPU passes over.
NUMPY_WARNS = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def use_triton():
    with _backends.use_backend("triton"):
        yield


def launcher(cut: tuple[int, int, int, int] | None) -> Run:
    """Runs the kernels, cut as they decide or as given, on memory that was nan, inside a frame that must stay nan."""
    from guda_fast.kernels.triton.group_norm_silu import Config, group_norm_silu

    def run(
        x: Tensor, groups: int, eps: float = 1e-5, silu: bool = True, unwritten: float = torch.nan, **vectors: Tensor
    ) -> Tensor:
        rows, channels, *sizes = x.shape
        positions = math.prod(sizes)
        frame = torch.full((rows + 2, positions + 2, channels + 2), unwritten, dtype=x.dtype, device=DEVICE)
        out = frame[1:-1, 1:-1, 1:-1].transpose(1, 2)
        flat = channels_last(x.reshape(rows, channels, positions)).to(DEVICE)
        given = tuple(None if vectors.get(name) is None else vectors[name].to(DEVICE) for name in NAMES)
        config = None if cut is None else Config(*cut)
        group_norm_silu(out, out.stride(), flat, flat.stride(), groups, given, eps=eps, silu=silu, config=config)
        around = int((frame.isnan() if math.isnan(unwritten) else frame == unwritten).sum())
        assert around == frame.numel() - x.numel(), "wrote too little or beyond"
        return out.cpu().reshape(x.shape)

    return run


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kernels", ["one", "two"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_eagers(
    case: tuple[int, int, int, tuple[int, ...], tuple[int, int, int, int]], kernels: str, dtype: torch.dtype
) -> None:
    rows, channels, groups, positions, cut = case
    run = launcher(None if kernels == "one" else cut)
    x = make(rows, channels, positions, dtype)
    vectors = make_vectors(rows, channels)
    assert_within_twice_eager(x, groups, run=run, **vectors)
    assert_within_twice_eager(x, groups, silu=False, run=run, **make_vectors(rows, channels, models=3))
    if positions:
        assert_within_twice_eager(x, groups, eps=0.1, addend=vectors["addend"], bias=vectors["bias"], run=run)


@pytest.mark.parametrize("offset", [30.0, 1e6])
@pytest.mark.parametrize("cut", [None, (1, 64, 2, 1)])
def test_large_offsets(offset: float, cut: tuple[int, int, int, int] | None) -> None:
    """Sums of squares in float32 would lose the deviations, and a mean of one float32 a digit."""
    x = make(1, 16, (16, 17), offset=offset)
    x[:, :, 0, 0] += 1e3
    assert_within_twice_eager(x, 2, run=launcher(cut))
    assert_within_twice_eager(x, 2, run=launcher(cut), **make_vectors(1, 16))


@NUMPY_WARNS
@pytest.mark.parametrize("cut", [None, (4, 8, 2, 1)])
def test_constant_groups_and_what_is_not_a_number(cut: tuple[int, int, int, int] | None) -> None:
    run = launcher(cut)
    bias = torch.arange(8.0)
    assert torch.equal(run(torch.full((2, 8, 5), 3.0), 4, silu=False, bias=bias), bias.view(8, 1).expand(2, 8, 5))
    x = make(2, 8, (5, 4))
    clean = run(x, 4)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[1, 3, 2, 2] = bad
        result = run(x, 4, unwritten=1e9)
        assert result[1, 2:4].isnan().all()
        result[1, 2:4] = clean[1, 2:4]
        assert torch.equal(result, clean)


@NUMPY_WARNS
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_activation_over_the_whole_range(dtype: torch.dtype) -> None:
    """Through a norm that is the identity but for its rounding: y runs over all that a bias can give."""
    y = torch.cat([torch.linspace(-110, 110, 4001), torch.logspace(-38, 38, 999), -torch.logspace(-38, 38, 1000)])
    y = torch.cat([y, torch.tensor([0.0, -0.0, 88.72, -88.72, -87.33, -103.0, 3e38, -3e38])])
    result = ops.group_norm_silu(torch.zeros(1, len(y), 2, dtype=dtype, device=DEVICE), 1, None, y.to(DEVICE))[0, :, 0]
    exact = y.double() / (1 + (-y.double()).exp())
    info = torch.finfo(dtype)
    # Below -87 the result is the smallest in size that float32 arithmetic gives, 87 e^-87, or zero.
    smallest = max(info.smallest_normal, 87 * math.exp(-87))
    if dtype == torch.float32:
        # exp is within three roundings, the sum, the quotient and y's own make it six.
        bound = 6 * 2.0**-24 * exact.abs() + smallest
    else:
        # exp2's argument rounds at the size of y, up to 88 / ln 2 here; the rest is 2^-21 and the result's rounding.
        bound = (info.eps / 2 + 2.0**-21 + y.abs().clamp(max=88) * 2.0**-23) * exact.abs() + smallest
        exact = exact.to(dtype).double().where(exact.abs() > info.max, exact)
    error = (result.cpu().double() - exact).abs()
    assert ((error <= bound) | (result.cpu() == exact)).all()


@pytest.mark.parametrize("cut", [None, (2, 8, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_rows_change_no_bit(dtype: torch.dtype, cut: tuple[int, int, int, int] | None) -> None:
    x, vectors, run = make(4, 12, (3, 5), dtype), make_vectors(4, 12, models=3), launcher(cut)
    expected = run(x, 4, **vectors)
    affine = {name: vectors[name] for name in ("weight", "bias")}
    for part in (slice(0, 1), slice(2, 4)):
        own = {name: vectors[name][part] for name in ("addend", "scale", "shift", "model_index")}
        assert torch.equal(run(x[part], 4, **own, **affine), expected[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype: torch.dtype) -> None:
    x, vectors = make(2, 12, (3, 5), dtype).to(DEVICE), make_vectors(2, 12)
    vectors = {name: vector.to(DEVICE) for name, vector in vectors.items()}
    expected = ops.group_norm_silu(x, 4, **vectors)
    assert expected.stride() == x.stride()
    wide = channels_last(torch.cat((x * torch.nan, x, x * torch.nan), dim=1))
    views = {
        "contiguous": x.contiguous(),
        "some channels": wide[:, 12:24],
        "some rows": channels_last(torch.stack((x, x * torch.nan), 1).flatten(0, 1))[::2],
        "every other position": channels_last(torch.stack((x, x * torch.nan), -1).flatten(-2))[..., ::2],
        "rows inside": x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    }
    tolerance = 4 * torch.finfo(dtype).eps  # threads share out another layout's sums in another order
    for name, view in views.items():
        result = ops.group_norm_silu(view, 4, **vectors)
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance, msg=name)
        assert result.stride() == torch.empty_like(view).stride(), name
    one = ops.group_norm_silu(x[:1].expand(2, -1, -1, -1), 4)
    assert torch.equal(one, ops.group_norm_silu(x[:1], 4).expand_as(x))
    pair = torch.cat((vectors["scale"], vectors["shift"]), 1)
    vectors["scale"], vectors["shift"] = pair.chunk(2, dim=1)
    vectors["addend"] = vectors["addend"].t().contiguous().t()
    vectors["weight"] = torch.stack((vectors["weight"], vectors["weight"]), 1)[:, 0]
    assert torch.equal(ops.group_norm_silu(x, 4, **vectors), expected)


@pytest.mark.parametrize("cut", [None, (2, 4, 1, 1)])
def test_offsets_beyond_32_bits(cut: tuple[int, int, int, int] | None) -> None:
    from guda_fast.kernels.triton.group_norm_silu import Config, group_norm_silu

    x = make(2, 8, (9,)).to(DEVICE)
    expected = ops.group_norm_silu(x, 2)
    far = torch.empty(2**31 + 256, device=DEVICE)  # only the pages that are touched take memory on a CPU
    for strides in ((2**31, 1, 24), (128, 1, 2**28 - 2)):
        view = far.as_strided((2, 8, 9), strides).copy_(x)
        out = torch.full_like(x, torch.nan)
        config = None if cut is None else Config(*cut)
        group_norm_silu(out, out.stride(), view, strides, 2, (None,) * 6, eps=1e-5, silu=True, config=config)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0), (2, 4, 3, 0), (3, 0, 2), (0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=DEVICE)
    vectors = {name: vector.to(DEVICE) for name, vector in make_vectors(*shape[:2]).items()}
    assert ops.group_norm_silu(x, 2, **vectors).shape == shape


@pytest.mark.parametrize("element_size", [2, 4])
def test_configuration_covers_every_shape(element_size: int) -> None:
    from guda_fast.kernels.triton.group_norm_silu import MAX_CHUNKS, configuration

    for positions in (1, 16, 49, 64, 1024, 4096, 10**6):
        for channels, groups in ((1, 1), (3, 3), (64, 32), (512, 32), (320, 32), (100, 20), (512, 1), (2**16, 1)):
            config = configuration(positions, channels, groups, element_size)
            covered = config.positions * max(config.tiles, 1)
            assert covered >= positions if config.tiles == 0 else math.ceil(positions / covered) <= MAX_CHUNKS
            assert {size & (size - 1) for size in (config.groups, config.positions, config.warps)} == {0}
            assert config.groups < 2 * groups
    # The networks of CIFAR are read once.
    for positions, channels in ((1024, 128), (1024, 512), (256, 256), (64, 256), (16, 512)):
        assert configuration(positions, channels, 32, element_size).tiles == 0


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 4, 3, 3, device=DEVICE)
    for value, groups, reason in (
        (x.double(), 2, "x is float64, and triton computes in float32"),
        (x[..., :2], 2, "the positions of x do not lie evenly in memory"),
        (x[..., :1, :1].expand(2, 4, 3, 3), 2, "the positions of x do not lie evenly in memory"),
        (torch.zeros(1, 2**17, device=DEVICE), 1, "groups have 131072 channels, and triton takes 65536 at most"),
        (torch._neg_view(x), 2, "x is a lazily negated view"),
    ):
        with pytest.raises(BackendUnavailableError, match=f"triton: {reason}"):
            ops.group_norm_silu(value, groups)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match="triton: the tensors are on cpu, and triton needs CUDA tensors"):
        ops.group_norm_silu(torch.zeros(2, 4), 2)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("cut", [None, (2, 8, 2, 1)])
def test_a_cuda_graph_replays_on_new_contents(cut: tuple[int, int, int, int] | None) -> None:
    from guda_fast.kernels.triton.group_norm_silu import Config, group_norm_silu

    x = make(3, 12, (35,)).to(DEVICE)
    out, config = torch.full_like(x, torch.nan), None if cut is None else Config(*cut)

    def run() -> None:
        group_norm_silu(out, out.stride(), x, x.stride(), 4, (None,) * 6, eps=1e-5, silu=True, config=config)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    x.copy_(x * 2 + torch.arange(12, device=DEVICE).view(12, 1))
    graph.replay()
    replayed = out.clone()
    run()
    assert torch.equal(replayed, out)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_ahead_of_time(capability: int, tmp_path: Path) -> None:
    lines = compiled("compile_group_norm_silu.py", capability, tmp_path)
    assert len(lines) == 40
    # Where registers are limited so that two programs fit on a multiprocessor, a few of a thread's 64 may spill; a
    # group of 32,768 channels does not fit into them.
    spilled = [int(line.rpartition(" ")[2]) for line in lines if "32768" not in line]
    assert max(spilled) <= 64, lines
