"""The kernel of the delta ops: its tiles through the interpreter, and its compilation for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

from delta_cases import BACKENDS, INDEX, random_layer

if "triton" not in BACKENDS:
    pytest.skip("needs triton", allow_module_level=True)


@pytest.mark.parametrize("form", ["dense", "rank 70"])
def test_segments_across_tiles(form: str) -> None:
    """Lengths around the tile's 16 rows: one tile less, exactly one, one row more, empty ones between."""
    from guda_fast.kernels.triton.delta_conv2d import Config
    from guda_fast.kernels.triton.delta_linear import delta_linear

    offsets = torch.tensor([0, 15, 15, 31, 48, 48, 81])
    layer = random_layer((81, 20), (33, 20), form, F.linear)
    for rows in (offsets, None):
        out = torch.full((81, 33) if rows is not None else (6, 81, 33), torch.nan)
        delta, up, down, bias_delta = (layer.deltas.get(name) for name in ("delta", "up", "down", "bias_delta"))
        arguments = (layer.x, layer.weight, layer.bias, rows, delta, up, down, bias_delta, INDEX)
        delta_linear(out, *arguments, models=6, config=Config(16, 16, 16, 4, 1))
        layer.check(out, rows, INDEX)


def test_configuration_is_a_table() -> None:
    from guda_fast.kernels.triton.delta_conv2d import configuration

    assert configuration(1, 2).rows == configuration(16, 2).rows == 16
    assert configuration(17, 2).rows == 64
    assert configuration(10**9, 2).rows == 128
    assert configuration(10**9, 4).rows == 64


COMPILE = """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from guda_fast.kernels.triton import delta_conv2d as module

    kernel, capability = module._delta_conv2d_kernel, {capability}
    dtype, form, segments = "{dtype}", "{form}", {segments}
    config = module.configuration(10**6, 2 if dtype == "bf16" else 4)
    absent = {{"up", "down"}} if form == "dense" else {{"delta"}}
    absent |= set() if segments else {{"offsets"}}
    constants = dict(
        STEPS=4, TAPS=9, KERNEL_WIDTH=3, STRIDE_H=1, STRIDE_W=1, PADDING_H=1, PADDING_W=1, DILATION_H=1, DILATION_W=1,
        RANK_CHUNKS=1, BFLOAT16_BY_HAND=False, PRECISION="ieee", BLOCK_ROWS=config.rows, BLOCK_OUTPUTS=config.outputs,
        BLOCK_CHANNELS=config.channels, BLOCK_RANK=16, **dict.fromkeys(absent),
    )
    tensors = dict.fromkeys(("out", "x", "weight", "bias", "delta", "up", "down", "bias_delta"), "*" + dtype)
    tensors |= dict.fromkeys(("offsets", "delta_index"), "*i64")
    signature = {{name: "constexpr" if name in constants else tensors.get(name, "i32") for name in kernel.arg_names}}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = dict(num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert binary.asm["cubin"], "no machine code"
    assert binary.metadata.shared <= {shared}, binary.metadata.shared
    print(binary.metadata.shared)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "form", "segments"), [("bf16", "dense", True), ("fp32", "low-rank", False)])
@pytest.mark.parametrize(("capability", "shared"), [(80, 163 * 1024), (90, 227 * 1024), (100, 227 * 1024)])
def test_compiles_ahead_of_time(capability: int, shared: int, dtype: str, form: str, segments: bool) -> None:
    """In a process of its own: where the interpreter is on, the kernels here are not Triton's to compile."""
    script = textwrap.dedent(COMPILE).format(
        capability=capability, shared=shared, dtype=dtype, form=form, segments=segments
    )
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
