"""The swap plan: one resident model that each delta is written into in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guda_fast import ops
from guda_fast._validate import check_int
from guda_fast.deltas import DeltaBank
from guda_fast.diffusion import Protocol
from guda_fast.diffusion.schedule import FloatArray

DEFAULT_BATCH = {"cpu": 64, "cuda": 512}


class SwapPlan:
    """Runs rows through ``bank.model`` in batches, with the model of one group at a time.

    A row is a (query, draw) pair. Noising, forward and error of a batch use the same tensors in every batch, and
    the last, short batch is padded with its own first row, so that base and counterfactual run at one shape and
    their rounding cancels.

    bank: its resident model is moved to ``device`` and ``dtype``, in channels-last.
    protocol: the draws. batch_size: rows a forward [>= 1]. device: of the model. dtype: of the forwards and of
    x_t [float32 or float64].
    """

    def __init__(
        self,
        bank: DeltaBank,
        protocol: Protocol,
        *,
        batch_size: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        if batch_size is None:
            batch_size = DEFAULT_BATCH.get(self.device.type, DEFAULT_BATCH["cpu"])
        self.batch_size = check_int("SwapPlan", "batch_size", batch_size, 1)
        self.bank = bank.to(device=self.device, dtype=dtype, memory_format=torch.channels_last)
        self.seed, self.antithetic = protocol.seed, protocol.antithetic
        self.draws = _DrawTensors(protocol, self.device, dtype)

    @contextmanager
    def model(self, group: str | None) -> Iterator[nn.Module]:
        """The resident model as the base (None) or with one group's delta; the base again afterwards."""
        if group is None:
            yield self.bank.model
            return
        with self.bank.applied(group) as model:
            yield model

    @torch.inference_mode()
    def errors(self, model: nn.Module, x0: Tensor, ids: Tensor, query: Tensor, draw: Tensor) -> FloatArray:
        """Weighted errors of one batch of rows.

        x0: queries [(N, C, H, W), dtype, on device]. ids: the bits of their ids [(N,), int64, on device].
        query, draw: rows as indices into the queries and the protocol's draws [(R,), int64, R <= batch_size].

        Returns w_t e(t) of each row [(R,), float64].
        """
        rows = len(query)
        if rows < self.batch_size:
            query, draw = (torch.cat([index, index[:1].expand(self.batch_size - rows)]) for index in (query, draw))
        query, draw = query.to(self.device), draw.to(self.device)
        counters = (query, ids[query], self.draws.timestep[draw], self.draws.sample[draw])
        out = torch.empty(
            (self.batch_size, *x0.shape[1:]),
            dtype=self.dtype,
            device=self.device,
            memory_format=torch.channels_last,
        )
        x_t = ops.add_noise(
            x0,
            *counters,
            self.draws.x0_scale[draw],
            self.draws.eps_scale[draw],
            seed=self.seed,
            antithetic=self.antithetic,
            out=out,
        )
        prediction = model(x_t, counters[2], return_dict=False)[0]
        found = ops.denoising_error(
            prediction[None, :, : x0.shape[1]],
            x0,
            *counters,
            self.draws.target_x0_scale[draw],
            self.draws.target_eps_scale[draw],
            self.draws.weight[draw],
            seed=self.seed,
            antithetic=self.antithetic,
        )
        errors: FloatArray = found.errors[0, :rows].cpu().numpy()
        return errors


class _DrawTensors:
    """The protocol's draw table on the device."""

    def __init__(self, protocol: Protocol, device: torch.device, dtype: torch.dtype) -> None:
        table = protocol.table

        def tensor(values: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(values).to(device, dtype)

        self.timestep = tensor(table.timestep, torch.int64)
        self.sample = tensor(table.sample, torch.int64)
        self.weight = tensor(table.weight, torch.float64)
        self.x0_scale, self.eps_scale = tensor(table.x0_scale, dtype), tensor(table.eps_scale, dtype)
        self.target_x0_scale = tensor(table.target_x0_scale, dtype)
        self.target_eps_scale = tensor(table.target_eps_scale, dtype)
