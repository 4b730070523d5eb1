"""The engine: takes an arbitrary list of rows, and runs it by the plan that is fastest for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from guda_fast._validate import check_bool, check_choice, check_int
from guda_fast.deltas import DeltaBank
from guda_fast.diffusion import NoiseSource, Protocol
from guda_fast.diffusion.conditions import Conditions
from guda_fast.diffusion.schedule import FloatArray
from guda_fast.forward._routing import Inputs
from guda_fast.forward.activations import peak_bytes
from guda_fast.forward.batched_plan import BatchedPlan
from guda_fast.forward.batches import Advance, Batches
from guda_fast.forward.noised import BlankQueries, NoisedQueries
from guda_fast.forward.plan import PLANS, Choice, Planner
from guda_fast.forward.precision import POLICIES, Precision
from guda_fast.forward.rows import BASE, Rows
from guda_fast.forward.swap import SwapPlan

# A forward on a CPU should do so much work that Python's part in it does not count, and so little that its activations
# do not fill the memory; one on a GPU should fill it.
_CPU_BATCH, _CPU_LEAST, _CPU_MOST = 64, 8, 256
_CPU_LEAST_FLOP, _CPU_MOST_FLOP = 8e9, 1e12
_CUDA_BATCH = 512


def _nothing(_: int) -> None:
    return None


class Engine:
    """Runs (query, model, draw) rows of one bank under one protocol.

    bank: must hold its base; its resident model is moved, cast, put into channels-last and fused.
    protocol: the draws. shape: of one query (C, H, W). device: of the forwards. precision: see `policy`.
    conditions: like those of the queries to come, whose first one is used for measuring; None for an unconditional
        model.
    batch_size: rows a forward at most [>= 1; by default 64 on a CPU, more for a
        small and less for a large model; 512 on CUDA].
    plan: "swap", "batched", or "auto", which predicts both from measurements and takes the faster one; below fp32 it
        is swap, because the plans round differently there.
    compiled: run the swap plan's model through torch.compile, which takes a minute at the start.
    padded: fill every batch up to its size, so that on a CPU a row's error under the swap plan does not depend on how
        many rows it comes with: kernels are chosen by the size of a batch, and sum in another order for another one.

    When memory runs out the batch halves and the run goes on; results stay the same to rounding.
    """

    def __init__(
        self,
        bank: DeltaBank,
        protocol: Protocol,
        shape: Sequence[int],
        *,
        conditions: Conditions | None = None,
        device: torch.device | str = "cpu",
        precision: Precision = POLICIES["fp32"],
        batch_size: int | None = None,
        plan: str = "auto",
        compiled: bool = False,
        padded: bool = False,
    ) -> None:
        check_choice("Engine", "plan", plan, PLANS)
        check_bool("Engine", "compiled", compiled)
        check_bool("Engine", "padded", padded)
        if batch_size is not None:
            check_int("Engine", "batch_size", batch_size, 1)
        self.device = torch.device(device)
        self.precision = precision
        self.protocol = protocol
        self.shape = tuple(shape)
        self.bank = bank.to(device=self.device, dtype=precision.dtype, memory_format=torch.channels_last)
        self._memory = bank.memory
        self.batches = Batches(1 if batch_size is None else batch_size, fixed=compiled or padded)
        like = Conditions.none(1) if conditions is None else conditions[:1]
        layout = torch.channels_last if len(self.shape) == 3 else torch.contiguous_format
        x_t = torch.zeros((1, *self.shape), dtype=precision.dtype, device=self.device).contiguous(memory_format=layout)
        time = torch.from_numpy(protocol.table.model_timestep[:1]).to(self.device)
        first = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._example = Inputs(x_t, time, like.to(self.device, precision.dtype).take(first))
        self.swap = SwapPlan(bank, self.batches, compiled=compiled)
        if batch_size is None:
            self.batches.size = self._default_batch()
        make_batched = partial(BatchedPlan, bank, self.batches, self._example, self.swap.forward.forget_graphs)
        wanted, because = plan, "it was asked for"
        if plan == "auto" and precision.storage is not None:
            wanted = "swap"
            because = f"in {precision.name} plans round differently, and scores must not hang on a stopwatch"
        # No method: plans that held the engine would keep its graphs alive until the next collection.
        probe = partial(_probe, protocol, self.shape, self.device, precision.dtype, like)
        self.planner = Planner(self.swap, make_batched, probe, protocol.draws, wanted, because)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What was chosen so far, and why."""
        return tuple(self.planner.choices.values())

    def queries(
        self,
        x0: Tensor,
        ids: Sequence[int],
        names: Sequence[str] | None = None,
        *,
        conditions: Conditions | None = None,
        noise: NoiseSource | None = None,
    ) -> NoisedQueries:
        """Queries with their conditions and noise on the device; see `NoisedQueries`."""
        return NoisedQueries(
            x0,
            ids,
            self.protocol,
            device=self.device,
            dtype=self.precision.dtype,
            names=names,
            conditions=conditions,
            noise=noise,
        )

    def errors(self, queries: NoisedQueries, rows: Rows, advance: Advance = _nothing) -> FloatArray:
        """Weighted errors w_t e(t) of the rows, in their order [(R,), float64].

        advance: called with the number of rows after every batch; what it raises ends the run.
        Raises ValueError where a row has no such query, model or draw, and FloatingPointError where an error is
        NaN or infinite.
        """
        rows.check(len(queries.x0), len(self.bank) + 1, queries.draws)
        if len(rows) == 0:
            return np.empty(0)
        with self._active():
            return self.planner.plan(rows).run(queries, rows, advance)

    def differences(self, queries: NoisedQueries, rows: Rows, advance: Advance = _nothing) -> FloatArray:
        """Weighted errors of the rows less those of the base at the same query and draw [(R,), float64].

        What is not known yet of the base is computed once, and kept in ``queries.base_errors``.
        """
        rows.check(len(queries.x0), len(self.bank) + 1, queries.draws)
        base = torch.from_numpy(queries.base_errors)
        wanted = torch.zeros(base.shape, dtype=torch.bool)
        wanted[rows.query, rows.draw] = True
        query, draw = (wanted & base.isnan()).nonzero().unbind(1)
        counterfactual = (rows.model != BASE).nonzero().flatten()
        own = rows[counterfactual]
        work = Rows(
            torch.cat([query, own.query]),
            torch.cat([torch.full_like(query, BASE), own.model]),
            torch.cat([draw, own.draw]),
        )
        errors = torch.from_numpy(self.errors(queries, work, advance))
        base[query, draw] = errors[: len(query)]
        difference = torch.zeros(len(rows), dtype=torch.float64)
        difference[counterfactual] = errors[len(query) :] - base[own.query, own.draw]
        result: FloatArray = difference.numpy()
        return result

    def choose(self, models: int, rows: int) -> Choice:
        """What would run so many rows of each of so many models; measures what it needs to know, now."""
        with self._active():
            return self.planner.choose(np.full(models, rows), now=True)

    def seconds(self, choice: Choice, models: int, rows: int) -> float:
        """Predicted time of such work under the plan that was chosen."""
        with self._active():
            return self.planner.seconds(choice.plan, np.full(models, rows))

    @contextmanager
    def _active(self) -> Iterator[None]:
        """On the engine's device, in its precision; refuses a bank that was moved since."""
        if self.bank.memory != self._memory:
            raise RuntimeError(
                "Engine: bank must stay as the engine put it, got a model that was moved or cast since, as by another "
                "engine; make a new one"
            )
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_device, self.precision.active(self.device):
            yield

    @cached_property
    def flop(self) -> float:
        """Multiplications and additions that a forward of one row takes, as far as torch counts them."""
        # Imports triton, which must not come before a caller has said whether to interpret it.
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self._eager_row()
        return float(counter.get_total_flops())

    @cached_property
    def activation_bytes_a_row(self) -> int:
        """The memory that a forward takes at its peak for each row, beside the model."""
        return peak_bytes(self._eager_row)

    @torch.inference_mode()
    def _eager_row(self) -> None:
        """A forward of one row that no graph or compiled code hides."""
        with self._active():
            self._example.run(self.bank.model)

    def _default_batch(self) -> int:
        """A power of two that depends on the model alone, so that runs of one plan can be repeated to the bit."""
        if self.device.type == "cuda":
            return _CUDA_BATCH
        size = _CPU_BATCH
        while size < _CPU_MOST and size * self.flop < _CPU_LEAST_FLOP:
            size *= 2
        while size > _CPU_LEAST and size * self.flop > _CPU_MOST_FLOP:
            size //= 2
        return size


def _probe(
    protocol: Protocol, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, like: Conditions, queries: int
) -> NoisedQueries:
    """So many queries without an image, all under the given condition."""
    conditions = like[torch.zeros(queries, dtype=torch.int64)]
    x0 = torch.zeros((queries, *shape))
    return BlankQueries(x0, range(queries), protocol, device=device, dtype=dtype, conditions=conditions)
