"""R4: the forwards alone, which nothing that runs them can beat."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class BareForwards:
    """As many forwards, on batches of the same shape, as a plan makes: no noise, no errors, no weights swapped.

    forward: the plan's own model, called with x_t and timesteps. shape: of a batch (B, C, H, W).
    batches: of all models together.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor], object],
        shape: tuple[int, ...],
        *,
        batches: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._forward, self._batches = forward, batches
        generator = torch.Generator(device).manual_seed(0)
        noise = torch.randn(shape, generator=generator, device=device)
        self._x_t = noise.to(dtype=dtype, memory_format=torch.channels_last)
        self._timestep = 10 + torch.arange(shape[0], device=device)

    @torch.inference_mode()
    def run(self) -> object:
        """Make the forwards; returns the last result, which the device may not have finished."""
        result: object = None
        for _ in range(self._batches):
            result = self._forward(self._x_t, self._timestep)
        return result
