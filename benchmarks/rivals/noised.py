"""The (query, draw) rows of a workload as tuned code has them: flattened, noised once, ready for every model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guda_fast import Protocol
from guda_fast.diffusion.schedule import FloatArray


@dataclass(frozen=True, eq=False)
class NoisedRows:
    """All rows, draws innermost, padded with copies of the first one to a whole number of batches.

    x_t: [(R, C, H, W), the model's dtype]. timestep: [(R,), int64]. eps: [(R, C, H, W), float32].
    weight: [(R,), float64]. number: of rows that count. Memory grows with R: two images a row.
    """

    x_t: Tensor
    timestep: Tensor
    eps: Tensor
    weight: Tensor
    number: int
    batch: int

    @staticmethod
    def make(
        queries: Tensor,
        protocol: Protocol,
        batch: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        noise: Tensor | None = None,
    ) -> NoisedRows:
        """Noise the queries under every draw of the protocol, which must have epsilon predictions.

        noise: [(N, D, C, H, W), float32]; None draws it from the protocol's seed with torch.randn
        """
        if protocol.schedule.prediction_type != "epsilon":
            raise ValueError(f"NoisedRows: models must predict epsilon, got {protocol.schedule.prediction_type}")
        table, shape = protocol.table, (len(queries), protocol.draws, *queries.shape[1:])
        if noise is None:
            generator = torch.Generator(device).manual_seed(protocol.seed)
            noise = torch.randn(shape, generator=generator, device=device)

        def columns(values: FloatArray) -> Tensor:
            return torch.from_numpy(values).to(device, torch.float32)[:, None, None, None]

        eps = noise.to(device).reshape(-1, *shape[2:])
        x0 = queries.to(device).repeat_interleave(shape[1], dim=0)
        draw = torch.arange(shape[1], device=device).repeat(len(queries))
        x_t = columns(table.x0_scale)[draw] * x0 + columns(table.eps_scale)[draw] * eps
        padded = [*range(len(draw)), *[0] * (-len(draw) % batch)]
        row = torch.tensor(padded, device=device)
        return NoisedRows(
            x_t=x_t[row].to(dtype=dtype, memory_format=memory_format),
            timestep=torch.from_numpy(table.timestep).to(device)[draw][row],
            eps=eps[row].contiguous(memory_format=memory_format),
            weight=torch.from_numpy(table.weight).to(device)[draw][row],
            number=len(draw),
            batch=batch,
        )

    def batches(self) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """Where each batch lies in the rows, and its x_t, timesteps, eps and weights."""
        for start in range(0, len(self.x_t), self.batch):
            part = slice(start, start + self.batch)
            yield part, (self.x_t[part], self.timestep[part], self.eps[part], self.weight[part])

    def scores(self, errors: Tensor, queries: int) -> FloatArray:
        """Sums over each query's draws of what the errors of models 1 to K exceed those of model 0 by [(N, K)].

        errors: weighted errors [(K + 1, R), float64]. The one place that waits for the device.
        """
        counted = errors[:, : self.number].cpu().numpy().reshape(len(errors), queries, -1)
        return np.ascontiguousarray((counted[1:] - counted[0]).sum(axis=2).T)


def row_errors(model: Callable[..., Any], x_t: Tensor, timestep: Tensor, eps: Tensor, weight: Tensor) -> Tensor:
    """w || eps_m(x_t, t) - eps ||^2 of every row [(R,), float64]: the posterior's KL in closed form.

    What a model predicts beyond the channels of eps is its variance, and is left out.
    """
    prediction: Tensor = model(x_t, timestep, return_dict=False)[0]
    difference = prediction[:, : eps.shape[1]].float() - eps
    return weight * difference.square().flatten(1).sum(1).double()
