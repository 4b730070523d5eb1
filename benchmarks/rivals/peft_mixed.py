"""R3: PEFT's two ways to run many adapters: rows of several in one batch, and one merged at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals.noised import NoisedRows, row_errors
from benchmarks.rivals.tuned import resident
from benchmarks.workloads import Workload
from guda_fast.deltas import LowRank
from guda_fast.diffusion.schedule import FloatArray

BASE = "__base__"  # PEFT's name of rows without an adapter


class _Adapters:
    """The base in channels-last, with one adapter a counterfactual. Noise is torch.randn's own.

    workload: with low-rank deltas alone. batch: rows a forward. dtype: of weights, adapters and activations.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        batch: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._protocol, self._batch = workload.protocol, batch
        self._device, self._dtype = torch.device(device), dtype
        self._names = [f"group_{k}" for k in range(len(workload.deltas))]
        self._peft: Any = resident(_with_adapters(workload, self._names), self._device, dtype).eval()

    def _rows(self, queries: Tensor, batch: int, noise: Tensor | None) -> NoisedRows:
        return NoisedRows.make(
            queries,
            self._protocol,
            batch,
            device=self._device,
            dtype=self._dtype,
            memory_format=torch.channels_last,
            noise=noise,
        )


class PeftMixed(_Adapters):
    """Each row is in the batch once a model, so that a batch has rows of all of them: `adapter_names`."""

    @torch.inference_mode()
    def scores(self, queries: Tensor, noise: Tensor | None = None) -> FloatArray:
        """Scores [(N, K), float64] of queries [(N, C, H, W), float32]; noise: [(N, D, C, H, W)] instead of its own."""
        models = [BASE, *self._names]
        distinct = max(1, self._batch // len(models))
        names = models * distinct

        def model(x_t: Tensor, timestep: Tensor, return_dict: bool) -> Any:
            return self._peft(x_t, timestep, return_dict=return_dict, adapter_names=names)

        rows = self._rows(queries, distinct, noise)
        errors = []
        for _, batch in rows.batches():
            x_t, *others = (tensor.repeat_interleave(len(models), dim=0) for tensor in batch)
            x_t = x_t.contiguous(memory_format=torch.channels_last)
            errors.append(row_errors(model, x_t, *others).view(distinct, -1).T)
        return rows.scores(torch.cat(errors, dim=1), len(queries))


class PeftMerged(_Adapters):
    """One adapter after another is merged into the weights, and subtracted again after its batches.

    In 16 bits the weights drift by a rounding with each adapter, since subtracting does not undo a rounded sum.
    """

    @torch.inference_mode()
    def scores(self, queries: Tensor, noise: Tensor | None = None) -> FloatArray:
        """Scores [(N, K), float64] of queries [(N, C, H, W), float32]; noise: [(N, D, C, H, W)] instead of its own."""
        rows = self._rows(queries, self._batch, noise)
        errors = torch.empty(1 + len(self._names), len(rows.x_t), dtype=torch.float64, device=self._device)
        with self._peft.disable_adapter():
            self._fill(errors[0], rows)
        for name, row in zip(self._names, errors[1:], strict=True):
            self._peft.set_adapter(name)
            self._peft.merge_adapter([name])
            self._fill(row, rows)
            self._peft.unmerge_adapter()
        return rows.scores(errors, len(queries))

    def _fill(self, errors: Tensor, rows: NoisedRows) -> None:
        for part, batch in rows.batches():
            errors[part] = row_errors(self._peft, *batch)


def _with_adapters(workload: Workload, names: list[str]) -> Any:
    """A PeftModel of a copy of the base, whose adapters hold the factors of the deltas."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("peft_mixed: needs the package peft: pip install 'guda_fast[peft]'") from error

    model: Any = copy.deepcopy(workload.base)
    for name, delta in zip(names, workload.deltas, strict=True):
        ranks = {part.rank if isinstance(part, LowRank) else 0 for part in delta.parts.values()}
        rank = max(ranks)
        if ranks != {rank} or rank == 0:
            raise ValueError("peft_mixed: workload must have low-rank deltas of one rank, got others")
        layers = [key.removesuffix(".weight") for key in delta.parts]
        # alpha = r: a scale of one.
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)
        if name == names[0]:
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        _fill_adapter(model.get_base_model(), name, delta.parts)
    return model


def _fill_adapter(model: nn.Module, name: str, parts: Any) -> None:
    for key, part in parts.items():
        layer: Any = model.get_submodule(key.removesuffix(".weight"))
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        down.data.copy_(part.down)
        up.data.copy_(part.up.view(up.shape))
