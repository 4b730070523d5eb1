"""R1: what an expert writes in an afternoon."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals.noised import NoisedRows, row_errors
from benchmarks.workloads import Workload
from guda_fast.diffusion.schedule import FloatArray
from guda_fast.forward import POLICIES


class Tuned:
    """Large flattened batches in channels-last and low precision, compiled; weights swapped in place.

    Noise is torch.randn's own, made once for all models, with every noised row kept in memory. The weights of all
    counterfactuals, low-rank ones merged, lie ready on the device before the clock starts. No batch is waited for.

    batch: rows a forward; the last one is padded to it. dtype: of weights and activations; errors are float32, their
    sums float64. tf32: let float32 products use tensor cores. compiler: a backend of torch.compile, or None for eager.
    mode: of Inductor: on CUDA "max-autotune-no-cudagraphs", or "reduce-overhead", which captures a CUDA graph.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        batch: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tf32: bool = False,
        compiler: str | None = "inductor",
        mode: str | None = None,
    ) -> None:
        self._protocol, self._batch = workload.protocol, batch
        self._device, self._dtype = torch.device(device), dtype
        self._products = POLICIES["tf32" if tf32 else "fp32"]
        self._model = resident(workload.base, self._device, dtype)
        parameters = dict(self._model.named_parameters())
        self._targets = [parameters[name].data for name in workload.changed()]
        self._weights = [
            [torch.empty_like(target).copy_(value) for target, value in zip(self._targets, values, strict=True)]
            for values in (workload.weights(model).values() for model in range(workload.models))
        ]
        self._errors: Callable[..., Tensor] = partial(row_errors, self._model)
        self._called = False
        if compiler is not None:
            if torch._inductor.config.freezing:
                raise ValueError("Tuned: torch._inductor.config.freezing must be off: frozen weights ignore swaps")
            # What other shapes left behind counts towards the eight recompilations after which all is eager.
            torch.compiler.reset()
            self._errors = torch.compile(self._errors, backend=compiler, mode=mode, dynamic=False, fullgraph=True)

    @torch.inference_mode()
    def scores(self, queries: Tensor, noise: Tensor | None = None) -> FloatArray:
        """Scores [(N, K), float64] of queries [(N, C, H, W), float32]; noise: [(N, D, C, H, W)] instead of its own."""
        with self._products.active(self._device), _compiling(allowed=not self._called):
            rows = NoisedRows.make(
                queries,
                self._protocol,
                self._batch,
                device=self._device,
                dtype=self._dtype,
                memory_format=torch.channels_last,
                noise=noise,
            )
            errors = torch.empty(len(self._weights), len(rows.x_t), dtype=torch.float64, device=self._device)
            for model, weights in enumerate(self._weights):
                torch._foreach_copy_(self._targets, weights)
                for part, batch in rows.batches():
                    errors[model, part] = self._errors(*batch)
            self._called = True
            return rows.scores(errors, len(queries))


def resident(base: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of the base on the device, in channels-last."""
    # Not base.to: diffusers' own warns about modules that it would rather keep in float32.
    to: Any = nn.Module.to
    model: nn.Module = to(copy.deepcopy(base), device=device, dtype=dtype, memory_format=torch.channels_last)
    return model


@contextmanager
def _compiling(*, allowed: bool) -> Iterator[None]:
    """One that is not allowed is an error: eager code may follow too many of them."""
    with warnings.catch_warnings(), torch._dynamo.config.patch(error_on_recompile=not allowed):
        # In diffusers' Upsample2D, of a function that compares version numbers; and in Inductor itself.
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        yield
