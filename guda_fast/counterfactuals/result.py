"""What a training run gives."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from guda_fast._files import atomic_write
from guda_fast.counterfactuals.config import TrainConfig
from guda_fast.counterfactuals.log import LOG


@dataclass(frozen=True)
class TrainResult:
    """A trained model and how it came about.

    model: a new module with the trained (or averaged) weights, in eval mode, on the device of the base
    config: the run's settings
    losses: the objective, one a step. retain_losses, forget_losses: its mean squared errors without weights, one a
        step; None where a step has no forget rows
    log: JSON objects, one a step
    seconds: wall time of the steps, also of those before a resumption; of runs together, that of all
    steps: after how many steps the model was taken
    stopped: why the run ended early [None for one that went to its end]
    factors: of a LoRA run, as ``save_adapter`` takes them
    """

    model: nn.Module
    config: TrainConfig
    losses: Sequence[float]
    retain_losses: Sequence[float]
    forget_losses: Sequence[float | None]
    log: Sequence[str]
    seconds: float
    steps: int
    stopped: str | None = None
    factors: Mapping[str, Any] | None = None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model with ``save_pretrained``, a LoRA run as a PEFT adapter instead, and the log as log.jsonl.

        folder: made where it is not there. Raises TypeError for a model without ``save_pretrained``, OSError.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.factors is not None:
            from guda_fast.counterfactuals.lora import save_adapter

            save_adapter(self.factors, self.config, folder)
        else:
            write: Any = getattr(self.model, "save_pretrained", None)
            if write is None:
                raise TypeError(f"TrainResult.save: model must have save_pretrained, got {type(self.model).__name__}")
            write(folder)
        with atomic_write(folder / LOG, "w") as file:
            file.write("".join(f"{line}\n" for line in self.log))
