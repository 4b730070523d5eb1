"""What several tests of delta packs share: a base, counterfactuals of each kind, and ways to damage a pack."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from guda_fast.deltas import Delta, DeltaBank, Dense, LowRank
from guda_fast.deltas.pack_format import text_hash
from guda_fast.errors import CheckpointError


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.norm = torch.nn.BatchNorm2d(8)
        self.linear = torch.nn.Linear(8, 6)
        self.scale = torch.nn.Parameter(torch.tensor(2.0))


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(rank: int = 2, seed: int = 0) -> LowRank:
    return LowRank(normal(8, rank, seed=seed), normal(rank, 3, 3, 3, seed=seed + 1))


def deltas() -> dict[str, Delta]:
    """Dense, low-rank and both, in different parameters, with two ranks and a tensor without dimensions."""
    return {
        "dense": Delta({"conv.weight": Dense(normal(8, 3, 3, 3)), "scale": Dense(torch.tensor(0.5))}),
        "rank 2": Delta({"conv.weight": factors(2)}),
        "again": Delta({"conv.weight": factors(2, seed=5)}),
        "rank 1": Delta({"conv.weight": factors(1, seed=7), "linear.bias": Dense(normal(6))}),
        "also dense": Delta({"conv.weight": Dense(normal(8, 3, 3, 3, seed=9))}),
    }


def changed(model: torch.nn.Module, name: str, value: float) -> torch.nn.Module:
    """A copy in which one parameter is moved."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(name).add_(value)
    return other


def refusal(use: Callable[[], object]) -> str:
    """The message of the CheckpointError that a call raises; empty where it raises none."""
    try:
        use()
    except CheckpointError as error:
        return str(error)
    return ""


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The safetensors header of a file, and the values behind it."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write_header(path: Path, header: dict[str, Any], values: bytes) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a pack says of itself, and write the hash that goes with it, as one who means harm would."""
    header, values = read_header(path)
    pack = json.loads(header["__metadata__"]["pack"])
    change(pack)
    text = json.dumps(pack)
    header["__metadata__"] |= {"pack": text, "hash": text_hash(text)}
    write_header(path, header, values)


def states(bank: DeltaBank) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of every counterfactual."""
    return {
        group: {name: tensor.clone() for name, tensor in bank.apply(group).state_dict().items()}
        for group in bank.groups
    }


def assert_same_models(one: DeltaBank, other: DeltaBank) -> None:
    for group, state in states(other).items():
        for name, tensor in one.apply(group).state_dict().items():
            assert torch.equal(tensor, state[name]), (group, name)
