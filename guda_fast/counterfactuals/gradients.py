"""Forget gradients that are held to a share of the retain gradient's norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


@dataclass(frozen=True)
class Norms:
    """Norms of a step's weighted retain and forget gradients, and the factor that the latter got.

    None where they were not formed apart.
    """

    retain: float | None = None
    forget: float | None = None
    scale: float | None = None

    def record(self, unscaled: float) -> dict[str, float | None]:
        """For the log. unscaled: undoes the scaling of the loss."""
        if self.retain is None or self.forget is None:
            return {}
        return {
            "retain_norm": self.retain * unscaled,
            "forget_norm": self.forget * unscaled,
            "forget_scale": self.scale,
        }


class ForgetGradients:
    """The forget gradient of a step, summed over its batches, apart from what the parameters hold."""

    def __init__(self) -> None:
        self._sums: list[Tensor | None] = []

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Those of a batch, one a parameter; None where it has no part in the loss."""
        if not self._sums:
            self._sums = list(gradients)
            return
        self._sums = [
            new if old is None else old if new is None else old + new
            for old, new in zip(self._sums, gradients, strict=True)
        ]

    @torch.no_grad()
    def join(self, parameters: Sequence[nn.Parameter], masks: Sequence[Tensor], share: float | None) -> Norms:
        """Add min(1, share |g_retain| / |g_forget|) g_forget to the gradients of the parameters; begin anew.

        masks: elements that may change [none: all]. share: [None: no forget gradient was formed apart].
        """
        forget, self._sums = self._sums, []
        retain = [each.grad for each in parameters]
        for gradients in (retain, forget):
            for gradient, mask in zip(gradients, masks, strict=False):
                if gradient is not None:
                    gradient.mul_(mask)
        if share is None or not forget:
            return Norms()
        retain_norm, forget_norm = _norm(retain), _norm(forget)
        scale = min(1.0, share * retain_norm / forget_norm) if forget_norm > 0 else 1.0
        for parameter, gradient in zip(parameters, forget, strict=True):
            if gradient is not None:
                scaled = scale * gradient
                parameter.grad = scaled if parameter.grad is None else parameter.grad.add_(scaled)
        return Norms(retain_norm, forget_norm, scale)


def _norm(gradients: Sequence[Tensor | None]) -> float:
    norm = get_total_norm([gradient for gradient in gradients if gradient is not None]).item()
    return norm if math.isfinite(norm) else math.inf
