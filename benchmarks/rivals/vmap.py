"""R2: all models in one call, by torch.func."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.rivals.noised import NoisedRows, row_errors
from benchmarks.workloads import Workload
from guda_fast.diffusion.schedule import FloatArray


class StackedModels:
    """Every batch of rows goes through all K + 1 models at once, their weights stacked and the forward vmapped.

    Channels-first: the grouped convolutions that vmap makes are far slower in channels-last. Group norms are composed,
    since torch's fails under vmap. Noise is torch.randn's own.

    batch: rows a forward, of all models together. dtype: of weights and activations.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        batch: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._protocol, self._batch, self._models = workload.protocol, batch, workload.models
        self._device, self._dtype = torch.device(device), dtype
        separate = (workload.separate(model) for model in range(workload.models))
        # Not model.to: diffusers' own warns about modules that it would rather keep in float32.
        models = [nn.Module.to(model, device=device, dtype=dtype) for model in separate]
        self._parameters, self._buffers = stack_module_state(models)
        self._skeleton = nn.Module.to(copy.deepcopy(models[0]), device="meta")
        for module in self._skeleton.modules():
            if type(module) is nn.GroupNorm:
                module.__class__ = ComposedGroupNorm

    @torch.inference_mode()
    def scores(self, queries: Tensor, noise: Tensor | None = None) -> FloatArray:
        """Scores [(N, K), float64] of queries [(N, C, H, W), float32]; noise: [(N, D, C, H, W)] instead of its own."""
        rows = NoisedRows.make(
            queries,
            self._protocol,
            max(1, self._batch // self._models),
            device=self._device,
            dtype=self._dtype,
            memory_format=torch.contiguous_format,
            noise=noise,
        )

        def errors_of(parameters: dict[str, Tensor], buffers: dict[str, Tensor], *batch: Tensor) -> Tensor:
            def model(*arguments: Tensor, **options: bool) -> tuple[Tensor]:
                result: tuple[Tensor] = functional_call(self._skeleton, (parameters, buffers), arguments, options)
                return result

            return row_errors(model, *batch)

        of_all = vmap(errors_of, in_dims=(0, 0, None, None, None, None))
        with _attention_that_vmaps(self._device):
            errors = [of_all(self._parameters, self._buffers, *batch) for _, batch in rows.batches()]
        return rows.scores(torch.cat(errors, dim=1), len(queries))


class ComposedGroupNorm(nn.GroupNorm):
    """A group norm of operations that vmap knows; statistics in float32."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the original's name)
        grouped = input.unflatten(1, (self.num_groups, -1)).flatten(2).float()
        variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
        normed = ((grouped - mean) * torch.rsqrt(variance + self.eps)).to(input.dtype).reshape(input.shape)
        channels = (-1, *[1] * (input.dim() - 2))
        result: Tensor = normed * self.weight.view(channels) + self.bias.view(channels)
        return result


@contextmanager
def _attention_that_vmaps(device: torch.device) -> Iterator[None]:
    """On a CPU, fused attention has no batching rule, and would run model by model."""
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
