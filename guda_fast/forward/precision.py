"""Precision policies: in what the forwards compute, and what merging a delta loses in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from guda_fast._validate import check_choice

SAFE_COSINE = 0.99
"""Between a delta and what is left of it after merging it in a precision; below, merging is what costs scores."""


@dataclass(frozen=True)
class Precision:
    """One policy.

    name: "fp64", "fp32", "tf32", "fp16" or "bf16". dtype: of parameters, x_t and activations.
    tf32: whether float32 products on CUDA may be rounded to TF32. storage: the format, as surveys of a bank call
    it, whose rounding parameters go through, None where that loses nothing.
    """

    name: str
    dtype: torch.dtype
    tf32: bool = False
    storage: str | None = None

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """Set torch's switches for float32 products for the length of a ``with`` block, and set them back."""
        if device.type != "cuda":
            yield
            return
        # Before torch 2.9 the switch of convolutions was cudnn's own.
        cudnn: Any = torch.backends.cudnn
        switches = (torch.backends.cuda.matmul, getattr(cudnn, "conv", cudnn))
        before = [_get_tf32(switch) for switch in switches]
        try:
            for switch in switches:
                _set_tf32(switch, self.tf32)
            yield
        finally:
            for switch, allowed in zip(switches, before, strict=True):
                _set_tf32(switch, allowed)


POLICIES = {
    policy.name: policy
    for policy in (
        Precision("fp64", torch.float64),
        Precision("fp32", torch.float32),
        Precision("tf32", torch.float32, tf32=True, storage="tf32"),
        Precision("fp16", torch.float16, storage="float16"),
        Precision("bf16", torch.bfloat16, storage="bfloat16"),
    )
}


def policy(where: str, name: object, device: torch.device) -> Precision:
    """The policy of that name, which must run on the device.

    Raises TypeError or ValueError naming the argument ``precision``.
    """
    check_choice(where, "precision", name, POLICIES)
    chosen = POLICIES[str(name)]
    if device.type == "cpu" and chosen.name in ("tf32", "fp16"):
        raise ValueError(f"{where}: precision must be fp32, bf16 or fp64 on a CPU, got {name!r}")
    return chosen


def fastest_first(device: torch.device) -> list[Precision]:
    """What "auto" tries, in this order: the first that an audit passes is taken, and fp32 needs none.

    On CUDA fp16 before bf16, which is as fast and keeps fewer bits. On a CPU bf16 where it has instructions for it.
    """
    names = ["fp16", "tf32", "fp32"]
    if device.type == "cpu":
        names = ["bf16", "fp32"] if _cpu_has_bfloat16() else ["fp32"]
    return [POLICIES[name] for name in names]


def _cpu_has_bfloat16() -> bool:
    # New in torch 2.10; without it nothing is promised.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


# Since torch 2.9 there are two ways to say so, and the old one raises where the new one was used.
def _get_tf32(switch: Any) -> Any:
    return switch.fp32_precision if hasattr(switch, "fp32_precision") else switch.allow_tf32


def _set_tf32(switch: Any, allowed: Any) -> None:
    if not hasattr(switch, "fp32_precision"):
        switch.allow_tf32 = allowed
    else:
        switch.fp32_precision = allowed if isinstance(allowed, str) else ("tf32" if allowed else "ieee")
