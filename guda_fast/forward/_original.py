"""When a fused module runs the operations of the class that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def runs_original(x: Tensor) -> bool:
    """Where gradients are recorded, autocast decides on types or hooks watch every module, the original's code runs."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.is_grad_enabled() or autocast or watches_all()


def watches_all() -> bool:
    watchers = nn.modules.module
    return bool(watchers._global_forward_hooks or watchers._global_forward_pre_hooks)
