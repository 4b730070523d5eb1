"""The kernel of the delta ops: its tiles through the interpreter, and its compilation for GPUs that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ahead_of_time import compiled
from delta_cases import BACKENDS, DEVICE, INDEX, OFFSETS, random_layer
from guda_fast import ops

if "triton" not in BACKENDS:
    pytest.skip("needs triton", allow_module_level=True)


@pytest.mark.parametrize("form", ["dense", "rank 70"])
def test_segments_across_tiles(form: str) -> None:
    """Lengths around the tile's 16 rows: one tile less, exactly one, one row more, empty ones between."""
    from guda_fast.kernels.triton.delta_conv2d import Config
    from guda_fast.kernels.triton.delta_linear import delta_linear

    offsets, index = torch.tensor([0, 15, 15, 31, 48, 48, 81]).to(DEVICE), INDEX.to(DEVICE)
    layer = random_layer((81, 20), (33, 20), form, F.linear)
    for rows in (offsets, None):
        out = torch.full((81, 33) if rows is not None else (6, 81, 33), torch.nan, device=DEVICE)
        delta, up, down, bias_delta = (layer.deltas.get(name) for name in ("delta", "up", "down", "bias_delta"))
        arguments = (layer.x, layer.weight, layer.bias, rows, delta, up, down, bias_delta, index)
        delta_linear(out, *arguments, models=6, config=Config(16, 16, 4, 1))
        layer.check(out, rows, INDEX)


@pytest.mark.parametrize("form", ["dense", "rank 3", "bias"])
def test_the_launch_reads_no_value(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets and indices stay on their device: reading one would synchronise, and break the capture of a graph."""
    from guda_fast.kernels.triton.delta_linear import delta_linear

    layer = random_layer((9, 5), (4, 5), form, F.linear)
    offsets, index = OFFSETS.to(DEVICE), INDEX.to(DEVICE)
    out = layer.x.new_full((9, 4), torch.nan)

    def read(*arguments: object) -> None:
        raise AssertionError("a value was read")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__index__"):
            patch.setattr(torch.Tensor, name, read)
        deltas = (layer.deltas.get(name) for name in ("delta", "up", "down", "bias_delta"))
        delta_linear(out, layer.x, layer.weight, layer.bias, offsets, *deltas, index, models=6)
    layer.check(out, offsets, index)


@pytest.mark.parametrize("form", ["dense", "rank 3"])
def test_offsets_beyond_32_bits(form: str) -> None:
    """Rows of x, deltas and channels of the weight, each further apart than 32 bits reach."""
    layer = random_layer((2, 3), (2, 3), form, F.linear)
    far = layer.x.new_empty(2**31 + 256)  # only the pages that are touched take memory on a CPU

    def apart(tensor: torch.Tensor, place: int) -> torch.Tensor:
        return far[place:].as_strided(tensor.shape, (2**31, *tensor.stride()[1:])).copy_(tensor)

    offsets, index = torch.tensor([0, 1, 2]).to(DEVICE), torch.tensor([1, 0]).to(DEVICE)
    deltas = {name: tensor[:2] for name, tensor in layer.deltas.items()}
    spread = {name: apart(tensor, 32 * n + 64) for n, (name, tensor) in enumerate(deltas.items())}
    arguments = {"offsets": offsets, "delta_index": index, "backend": "triton"}
    expected = ops.delta_linear(layer.x, layer.weight, layer.bias, **arguments, **deltas)
    result = ops.delta_linear(apart(layer.x, 0), apart(layer.weight, 32), layer.bias, **arguments, **spread)
    assert torch.equal(result, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "shared"), [(80, 99 * 1024), (90, 227 * 1024), (100, 227 * 1024)])
def test_compiles_ahead_of_time(capability: int, shared: int, tmp_path: Path) -> None:
    """Every form in every arithmetic. 8.0 stands for 8.6 and 8.9 too, which share its code and have less memory."""
    lines = compiled("compile_delta.py", capability, tmp_path)
    assert len(lines) == (25 if capability == 90 else 16)  # there each size alone is 1 too
    assert [line for line in lines if int(line.split()[0]) > shared] == []
