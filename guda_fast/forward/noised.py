"""The queries of a run at the protocol's draws: what models see of them, and the errors of what they predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guda_fast import ops
from guda_fast._validate import check_tensor
from guda_fast.diffusion import NoiseSource, Protocol
from guda_fast.diffusion.conditions import Conditions
from guda_fast.diffusion.schedule import FloatArray
from guda_fast.forward.rows import BASE, Rows

_CHUNK = 64  # rows whose squares are in float64 at once


class NoisedQueries:
    """Queries on the device of a run, and x_t and targets for any of their draws, with the contract's noise or another.

    x0: queries [(N, C, H, W), float32]. ids: one a query [N, 0..2^64-1]. protocol: the draws.
    device, dtype: of the forwards; x_t is formed in float32 (float64 where dtype is) and rounded to dtype once.
    names: of the queries, for messages [N]. conditions: of the queries; None for an unconditional model.
    noise: where the noise comes from; None is the contract, whose ops make it on the way.

    base_errors holds the base's weighted errors as far as they are known [(N, D), float64, NaN where not].
    """

    def __init__(
        self,
        x0: Tensor,
        ids: Sequence[int],
        protocol: Protocol,
        *,
        device: torch.device,
        dtype: torch.dtype,
        names: Sequence[str] | None = None,
        conditions: Conditions | None = None,
        noise: NoiseSource | None = None,
    ) -> None:
        table = protocol.table
        self.device, self.dtype = device, dtype
        self.work = torch.float64 if dtype == torch.float64 else torch.float32
        self.x0 = x0.to(device, self.work)
        self.ids = torch.from_numpy(np.array(ids, dtype=np.uint64).view(np.int64)).to(device)
        self.names = tuple(map(str, range(len(x0)))) if names is None else tuple(names)
        conditions = Conditions.none(len(x0)) if conditions is None else conditions
        if len(conditions) != len(x0):
            raise ValueError(
                f"NoisedQueries: conditions must be those of {len(x0)} queries, got those of {len(conditions)}"
            )
        self.conditions = conditions.to(device, dtype)
        self.condition = self.conditions.row.to(device)
        self.seed, self.antithetic = protocol.seed, protocol.antithetic
        self.noise = noise
        self.base_errors = np.full((len(x0), protocol.draws), np.nan)
        self.timestep = torch.from_numpy(table.timestep).to(torch.int64)  # on the host: plans group rows by it
        self._time = torch.from_numpy(table.model_timestep).to(device)
        self._draws = torch.from_numpy(np.stack([table.timestep, table.sample])).to(device, torch.int64)
        scales = (table.x0_scale, table.eps_scale, table.target_x0_scale, table.target_eps_scale)
        self._scales = torch.from_numpy(np.stack(scales)).to(device, self.work)
        self._weight = torch.from_numpy(table.weight).to(device, torch.float64)

    @property
    def draws(self) -> int:
        """How many draws the protocol has."""
        return len(self.timestep)

    def batch(self, query: Tensor, draw: Tensor) -> NoisedBatch:
        """The rows (query, draw) of one forward [(B,), int64 each, on the device]."""
        return NoisedBatch(self, query, draw) if self.noise is None else GivenBatch(self, query, draw, self.noise)

    def check_finite(self, errors: FloatArray, rows: Rows, groups: Sequence[str]) -> None:
        """Raise FloatingPointError, naming model, query and draw, where the error of a row is NaN or infinite."""
        bad = np.flatnonzero(~np.isfinite(errors))
        if bad.size:
            row = int(bad[0])
            query, model, draw = int(rows.query[row]), int(rows.model[row]), int(rows.draw[row])
            name = "the base" if model == BASE else f"group {groups[model - 1]!r}"
            where = f"{name} for query {self.names[query]} at draw {draw}"
            raise FloatingPointError(f"Engine: errors must be finite, got {errors[row]} from {where}")


class BlankQueries(NoisedQueries):
    """Queries without an image, for measuring: nobody asked for their errors, so that these may be anything."""

    def check_finite(self, errors: FloatArray, rows: Rows, groups: Sequence[str]) -> None:
        """Pass over what another group than those of the run may give."""


class NoisedBatch:
    """Rows of one forward.

    timestep: of the protocol [(B,), int64]. time: the same as the model takes it [(B,), int64 or float32]. condition:
    its row in the queries' conditions [(B,), int64]; all on the device.
    """

    def __init__(self, queries: NoisedQueries, query: Tensor, draw: Tensor) -> None:
        self._queries = queries
        self.timestep, sample = queries._draws[:, draw]
        self.time = queries._time[draw]
        self.condition = queries.condition[query]
        self._counters = (query, queries.ids[query], self.timestep, sample)
        self._scales = queries._scales[:, draw]
        self._weight = queries._weight[draw]

    def conditions(self, rows: Tensor) -> dict[str, Any]:
        """What the model takes by name for rows of these conditions [(R,), int64, on the device]."""
        return self._queries.conditions.take(rows)

    def x_t(self) -> Tensor:
        """The noised queries [(B, C, H, W), the run's dtype, channels-last]."""
        queries, shape = self._queries, self._queries.x0.shape[1:]
        # Plain strides where there is no channels-last.
        layout = torch.channels_last if len(shape) == 3 else torch.contiguous_format
        out = torch.empty((len(self.timestep), *shape), dtype=queries.work, device=queries.device, memory_format=layout)
        x0_scale, eps_scale, _, _ = self._scales
        seed, antithetic = queries.seed, queries.antithetic
        ops.add_noise(queries.x0, *self._counters, x0_scale, eps_scale, seed=seed, antithetic=antithetic, out=out)
        return out.to(queries.dtype)

    def errors(self, prediction: Tensor) -> Tensor:
        """w_t e(t) of each row [(B,), float64, on the device]; prediction: as x_t."""
        queries = self._queries
        _, _, x0_scale, eps_scale = self._scales
        found = ops.denoising_error(
            prediction[None],
            queries.x0,
            *self._counters,
            x0_scale,
            eps_scale,
            self._weight,
            seed=queries.seed,
            antithetic=queries.antithetic,
        )
        return found.errors[0]


class GivenBatch(NoisedBatch):
    """Rows of one forward whose noise comes from elsewhere, and is held as long as they are."""

    def __init__(self, queries: NoisedQueries, query: Tensor, draw: Tensor, source: NoiseSource) -> None:
        super().__init__(queries, query, draw)
        shape = (len(query), *queries.x0.shape[1:])
        eps = source.noise(query, draw)
        check_tensor("NoiseSource", "noise", eps, shape=shape, dtypes=(torch.float32,), device=queries.x0.device)
        self._x0, self._eps = queries.x0[query], eps.to(queries.work)

    def x_t(self) -> Tensor:
        x0_scale, eps_scale, _, _ = self._scales
        mixed = self._mixed(x0_scale, eps_scale)
        if mixed.dim() == 4:
            mixed = mixed.contiguous(memory_format=torch.channels_last)
        return mixed.to(self._queries.dtype)

    def errors(self, prediction: Tensor) -> Tensor:
        _, _, x0_scale, eps_scale = self._scales
        difference = prediction.to(self._queries.work) - self._mixed(x0_scale, eps_scale)
        sums = [part.flatten(1).double().square().sum(1) for part in difference.split(_CHUNK)]
        return self._weight * torch.cat(sums)

    def _mixed(self, x0_scale: Tensor, eps_scale: Tensor) -> Tensor:
        """x0_scale x0 + eps_scale eps, row by row."""
        by_row = (-1, *[1] * (self._x0.dim() - 1))
        return x0_scale.view(by_row) * self._x0 + eps_scale.view(by_row) * self._eps
