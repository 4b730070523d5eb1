"""The device code of kernels/cuda compiled as host C++: words, normals and sums have the bits of the C++ kernels."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from guda_fast import _C, ops, reference
from noise_cases import DTYPES, SHAPES, layouts

MakeRows = Callable[..., tuple[Tensor, ...]]

ROOT = Path(__file__).resolve().parent.parent
CXX = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler (CXX, or c++ on PATH)")

FOUR = ctypes.c_int64 * 4
VECTORS = ("query_index", "query_id", "timestep", "sample", "x0_scale", "eps_scale")


class HostRows(ctypes.Structure):
    """As in cuda_host.cpp."""

    _fields_ = [
        ("x0", ctypes.c_void_p),
        ("x0_row", ctypes.c_int64),
        ("x0_strides", FOUR),
        ("sizes", FOUR),
        *((name, ctypes.c_void_p) for name in VECTORS),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("antithetic", "rows", "elements", "quads")),
    ]  # fmt: skip


def padded(values: tuple[int, ...], filler: int) -> tuple[int, ...]:
    return (filler,) * (4 - len(values)) + tuple(values)


def reads_quads(tensor: Tensor) -> bool:
    """The launcher's rule for accesses of 16 bytes."""
    return tensor[0].is_contiguous() and tensor.data_ptr() % 16 == 0 and tensor.stride(0) % 4 == 0


def host_rows(tensors: tuple[Tensor, ...], seed: int, antithetic: bool, quads: bool) -> HostRows:
    x0, *vectors = tensors
    return HostRows(
        x0.data_ptr(),
        x0.stride(0),
        FOUR(*padded(x0.stride()[1:], 0)),
        FOUR(*padded(tuple(x0.shape[1:]), 1)),
        *(vector.data_ptr() for vector in vectors),
        seed,
        antithetic,
        len(vectors[0]),
        x0[0].numel(),
        quads,
    )


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("cuda_host") / "cuda_host.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    command = [str(CXX), *flags, f"-I{ROOT}", str(ROOT / "tests" / "cuda_host.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def add_noise(
    host: ctypes.CDLL,
    tensors: tuple[Tensor, ...],
    out: Tensor,
    seed: int = 7,
    antithetic: bool = False,
    quads: bool = True,
) -> Tensor:
    rows = host_rows(tensors, seed, antithetic, quads and reads_quads(tensors[0]))
    out.fill_(torch.nan)
    strides = FOUR(*padded(out.stride()[1:], 0))
    host.host_add_noise(
        ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.stride(0)), strides,
        ctypes.c_int64(quads and reads_quads(out)), ctypes.byref(rows),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize("first", [0, 1021, 2**32 - 64])
def test_words_have_the_bits_of_the_extension(host: ctypes.CDLL, seed: int, first: int) -> None:
    draw = (-6_789_012_345_678_901_234, 999, 65535)
    words, expected = torch.zeros(256, dtype=torch.int32), torch.ones(256, dtype=torch.int32)
    _C.noise_words(expected.data_ptr(), 64, first, *draw, seed)
    arguments = (ctypes.c_int64(value) for value in (64, first, *draw))
    host.host_words(ctypes.c_void_p(words.data_ptr()), *arguments, ctypes.c_uint64(seed))
    assert torch.equal(words, expected)


# The uniforms at both ends, at the logarithm's fold (sqrt(1/2), 1/2), and the turns where the quadrant changes.
RADII = [0, 1, 2**22 - 1, 2**22, 5931641, 5931642, 5931643, 2**23 - 2, 2**23 - 1]
TURNS = [0, 2**20 - 1, 2**20, 2**21, 3 * 2**20 - 1, 3 * 2**20, 2**22, 5 * 2**20, 7 * 2**20 - 1, 7 * 2**20, 2**23 - 1]


def test_normals_at_extreme_uniforms_are_within_the_contract(host: ctypes.CDLL) -> None:
    radii, turns = torch.tensor(RADII), torch.tensor(TURNS)
    sweep = torch.arange(0, 2**23, 4099)
    pairs = torch.cat(
        (torch.cartesian_prod(radii, turns), torch.cartesian_prod(radii, sweep), torch.cartesian_prod(sweep, turns))
    )
    words = pairs << 9
    out = torch.full(words.shape, torch.nan)
    bits = torch.where(words >= 2**31, words - 2**32, words).int()
    host.host_box_muller(ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(bits.data_ptr()), ctypes.c_int64(len(words)))
    exact = reference.normals(words.repeat(1, 2), torch.float64)[:, :2]
    assert (out.double() - exact).abs().max() <= 4e-6


@pytest.mark.parametrize("antithetic", [False, True])
def test_a_million_normals_have_the_bits_of_cpp(host: ctypes.CDLL, make_rows: MakeRows, antithetic: bool) -> None:
    tensors = make_rows(4, (250_001,))
    expected = ops.add_noise(*tensors, seed=2**64 - 3, antithetic=antithetic, backend="cpp")
    result = add_noise(host, tensors, torch.empty_like(expected), 2**64 - 3, antithetic)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_add_noise_has_the_bits_of_cpp_in_every_layout(
    host: ctypes.CDLL, make_rows: MakeRows, shape: tuple[int, ...]
) -> None:
    x0, *vectors = make_rows(3, shape)
    vectors[4][1] = 0
    expected = ops.add_noise(x0, *vectors, seed=7, backend="cpp")
    for name, view in layouts(x0, 1).items():
        assert torch.equal(add_noise(host, (view, *vectors), torch.empty_like(expected)), expected), name
    for name, out in layouts(torch.zeros_like(expected), 1).items():
        assert torch.equal(add_noise(host, (x0, *vectors), out), expected), name
    scalar = add_noise(host, (x0, *vectors), torch.empty_like(expected), quads=False)
    assert torch.equal(scalar, expected)


def test_add_noise_writes_no_further(host: ctypes.CDLL, make_rows: MakeRows) -> None:
    tensors, memory = make_rows(3, (3, 6, 5)), torch.zeros(3, 6, 5, 6)
    out = memory.permute(0, 3, 1, 2)[:, :3]
    add_noise(host, tensors, out)
    assert (memory[..., 3:] == 0).all()
    flat = torch.zeros(3, 92)
    add_noise(host, make_rows(3, (90,)), flat[:, :90])
    assert (flat[:, 90:] == 0).all()


def denoising_error(
    host: ctypes.CDLL, predictions: Tensor, tensors: tuple[Tensor, ...], weight: Tensor, *, paired: bool, packed: bool
) -> tuple[Tensor, Tensor | None]:
    rows = host_rows(tensors, 7, False, reads_quads(tensors[0]))
    errors = torch.full(predictions.shape[:2], torch.nan, dtype=torch.float64)
    differences = torch.full_like(errors, torch.nan) if paired else None
    models, *_ = predictions.shape
    strides = (ctypes.c_int64 * 6)(*predictions.stride()[:2], *padded(predictions.stride()[2:], 0))
    host.host_denoising_error(
        ctypes.c_void_p(errors.data_ptr()),
        ctypes.c_void_p(None if differences is None else differences.data_ptr()),
        ctypes.c_void_p(predictions.data_ptr()), strides, ctypes.c_int64(DTYPES.index(predictions.dtype)),
        ctypes.c_int64(packed), ctypes.c_int64(models), ctypes.c_void_p(weight.data_ptr()), ctypes.byref(rows),
    )  # fmt: skip
    return errors, differences


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_denoising_error_has_the_bits_of_cpp_in_every_layout(
    host: ctypes.CDLL, make_rows: MakeRows, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensors, weight = make_rows(2, shape), torch.tensor([0.3, 3.0], dtype=torch.float64)
    random = torch.Generator().manual_seed(1)
    predictions = torch.randn((3, 2, *shape), generator=random).to(dtype)
    expected = ops.denoising_error(predictions, *tensors, weight, seed=7, paired=True, backend="cpp")
    for name, view in layouts(predictions, 2).items():
        errors, paired = denoising_error(host, view, tensors, weight, paired=True, packed=False)
        assert torch.equal(errors, expected.errors), name
        assert paired is not None
        assert expected.paired is not None
        assert torch.equal(paired, expected.paired), name
        assert torch.equal(denoising_error(host, view, tensors, weight, paired=False, packed=False)[0], errors), name
    errors, paired = denoising_error(host, predictions, tensors, weight, paired=True, packed=True)
    assert torch.equal(errors, expected.errors)
    assert paired is not None
    assert torch.equal(paired, expected.paired)
    assert torch.equal(denoising_error(host, predictions, tensors, weight, paired=False, packed=True)[0], errors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_value_is_widened_exactly(host: ctypes.CDLL, dtype: torch.dtype) -> None:
    halves = torch.arange(-(2**15), 2**15).to(torch.int16)
    wide = torch.zeros(2**16)
    host.host_widen(
        ctypes.c_void_p(wide.data_ptr()), ctypes.c_void_p(halves.data_ptr()), ctypes.c_int64(2**16),
        ctypes.c_int64(dtype == torch.float16),
    )  # fmt: skip
    expected = halves.view(dtype).float()
    assert torch.equal(wide.isnan(), expected.isnan())
    assert torch.equal(wide.nan_to_num(7.0), expected.nan_to_num(7.0))
