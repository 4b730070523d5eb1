"""Settings of a training run."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

from guda_fast._validate import check_choice, check_int, check_real, describe

PRECISIONS = ("fp32", "bf16", "fp16")
SELECTIONS = ("all", "cross-attention", "cross-attention-kv")
_SMALLEST = sys.float_info.min
_WHERE = "TrainConfig"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run, in optimiser steps.

    steps: optimiser steps [>= 1]. accumulate: batches a step, whose mean loss it minimises [>= 1].
    lr: AdamW's learning rate [> 0]. weight_decay: [>= 0].
    warmup_steps: the learning rate rises linearly over these steps [>= 0].
    decay: what it does afterwards ["constant", or "cosine" down to 0 at the last step].
    grad_clip: largest norm of the gradient [> 0, or None]. ema_decay: of the averaged weights that are
        returned [0..1, or None for the last weights]; it warms up as (1 + step) / (10 + step).
    precision: of the forwards ["fp32"; "bf16" and "fp16" through autocast, over weights that stay as they are];
        with fp16 the loss is scaled, and steps whose gradient overflows are left out.
    trained: which parameters change ["all", "cross-attention", "cross-attention-kv" for its keys and values, or
        patterns such as "*.attn2.to_k.*" for the parameters' names, as a tuple].
    lora_rank: of the factors that are trained instead of the selected weights [>= 1, or None for the weights].
        lora_alpha: the factors' product counts lora_alpha / lora_rank times [> 0, or None for lora_rank].
    saliency: share of each tensor's elements that may change: those of the largest |gradient| of the forget loss at
        the base [> 0..1, or None for all].
    retain_bound: the run ends where its retain loss exceeds the base's by this factor, on the same draws, and gives
        the last state within [>= 1, or None]. bound_every: steps from one look to the next [>= 1].
    seed: of batches, timesteps and noise, and of the factors [0..2^63-1].

    Raises TypeError or ValueError naming the argument.

    >>> TrainConfig(1000, warmup_steps=99).lr_factor(49)
    0.5
    """

    steps: int
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: str = "constant"
    grad_clip: float | None = 1.0
    ema_decay: float | None = None
    seed: int = 0
    accumulate: int = 1
    precision: str = "fp32"
    trained: str | tuple[str, ...] = "all"
    lora_rank: int | None = None
    lora_alpha: float | None = None
    saliency: float | None = None
    retain_bound: float | None = None
    bound_every: int = 50

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup_steps", 0), ("accumulate", 1), ("bound_every", 1), ("seed", 0)):
            self._keep(name, check_int(_WHERE, name, getattr(self, name), least))
        self._keep("lr", check_real(_WHERE, "lr", self.lr, _SMALLEST))
        self._keep("weight_decay", check_real(_WHERE, "weight_decay", self.weight_decay, 0))
        check_choice(_WHERE, "decay", self.decay, ("constant", "cosine"))
        check_choice(_WHERE, "precision", self.precision, PRECISIONS)
        bounds = {
            "grad_clip": (_SMALLEST, math.inf),
            "ema_decay": (0, 1),
            "lora_alpha": (_SMALLEST, math.inf),
            "saliency": (_SMALLEST, 1),
            "retain_bound": (1, math.inf),
        }
        for name, (low, high) in bounds.items():
            if getattr(self, name) is not None:
                self._keep(name, check_real(_WHERE, name, getattr(self, name), low, high))
        self._check_trained()

    def _keep(self, name: str, value: float) -> None:
        """Other libraries' numbers pass the checks, but are no JSON values."""
        object.__setattr__(self, name, value)

    def _check_trained(self) -> None:
        if isinstance(self.trained, str):
            check_choice(_WHERE, "trained", self.trained, SELECTIONS)
        elif not isinstance(self.trained, tuple) or not all(isinstance(pattern, str) for pattern in self.trained):
            raise TypeError(f"{_WHERE}: trained must be a choice or a tuple of patterns, got {describe(self.trained)}")
        if self.lora_rank is not None:
            self._keep("lora_rank", check_int(_WHERE, "lora_rank", self.lora_rank, 1))
            if self.saliency is not None:
                raise ValueError(f"{_WHERE}: saliency must be None with lora_rank, got {self.saliency}")
        elif self.lora_alpha is not None:
            raise ValueError(f"{_WHERE}: lora_alpha must be None without lora_rank, got {self.lora_alpha}")

    def lr_factor(self, step: int) -> float:
        """The learning rate of a step as a share of ``lr``."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.decay == "constant":
            return 1.0
        return (1 + math.cos(math.pi * (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))) / 2

    def settings(self) -> dict[str, Any]:
        """All fields as JSON values, as they come back from a file."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
