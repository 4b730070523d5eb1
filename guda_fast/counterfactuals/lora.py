"""LoRA runs of one base that are trained together, and their factors as PEFT adapters."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from guda_fast._files import atomic_write
from guda_fast._validate import check_int, check_real, describe
from guda_fast.counterfactuals._lora_layers import FactoredLayer, Factors, Segments, takes_factors
from guda_fast.counterfactuals.config import TrainConfig
from guda_fast.counterfactuals.selection import selected
from guda_fast.counterfactuals.students import Inputs, concatenated, forward
from guda_fast.deltas.delta import LowRank

_SMALLEST = torch.finfo(torch.float32).tiny


class LoraStudents:
    """The students of several runs as low-rank factors on one frozen base, which predict in one forward.

        W_k = W + (alpha / rank) up_k down_k      for each chosen weight W, of run k

    ``down`` begins Kaiming-uniform, with the same values in every run, and ``up`` at zero: all runs begin as the base.
    A run's factors are parameters of its own, so that its optimiser and gradient norm are those that it has alone; its
    predictions and gradients do not depend on the other runs of a step, beyond rounding. The base is in eval mode: what
    it draws in training, such as dropout, is off.

    base: any diffusers denoiser; only read, and shared where it is on the device: it must not change meanwhile
    runs: their names [distinct]. rank: r [>= 1]. alpha: [> 0].
    patterns: which weights, see ``TrainConfig.trained``; those of Linear layers and of convolutions with one group,
        padded with zeros, get factors, others stay as they are. seed: of ``down`` [>= 0].
    device: where they train [the base's].

    Raises TypeError or ValueError naming the argument. Source: Hu et al. 2021 (LoRA), equation 3.

    >>> students = LoraStudents(unet, ["cat", "dog"], rank=4, alpha=4)  # doctest: +SKIP
    >>> students.predict({"cat": Inputs(x_t, t, {})})["cat"].shape == x_t.shape  # doctest: +SKIP
    True
    """

    def __init__(
        self,
        base: nn.Module,
        runs: Sequence[str],
        *,
        rank: int,
        alpha: float,
        patterns: str | tuple[str, ...] = "all",
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        where = "LoraStudents"
        if not runs or len(set(runs)) < len(runs):
            raise ValueError(f"{where}: runs must be distinct names, at least one, got {describe(list(runs))}")
        check_int(where, "rank", rank, 1)
        self._scale = check_real(where, "alpha", alpha, _SMALLEST) / rank
        chosen = {
            name: module
            for name, module in base.named_modules()
            if name and takes_factors(module) and f"{name}.weight" in selected(base, patterns)
        }
        if not chosen:
            raise ValueError(
                f"{where}: patterns must name the weight of a Linear layer or a convolution, got {describe(patterns)}"
            )
        self._base, self._device = base, next(base.parameters()).device if device is None else device
        self._network, self._layers = _with_factored(base, chosen, self._scale, self._device)
        first = _first_factors(chosen, rank, seed, self._device)
        self._factors = {run: {name: _trainable(each) for name, each in first.items()} for run in runs}

    def parameters(self, run: str) -> list[nn.Parameter]:
        """The factors of a run, layer by layer."""
        return [factor for factors in self._factors[run].values() for factor in factors]  # type: ignore[misc]

    def predict(self, inputs: Mapping[str, Inputs]) -> dict[str, Tensor]:
        """What each run's student predicts for its rows, without variance channels [(B, C, H, W) each].

        inputs: of any of the runs, in any order and of any numbers of rows
        """
        rows = concatenated(list(inputs.values()))
        segments = Segments.of([len(each.x_t) for each in inputs.values()], rows.x_t.device)
        for name, layer in self._layers.items():
            layer.expect([self._factors[run][name] for run in inputs], segments)
        return dict(zip(inputs, forward(self._network, rows).split(segments.sizes), strict=True))

    def factors(self, run: str) -> dict[str, Factors]:
        """Copies of a run's factors by the base's names of the layers."""
        return {
            name: Factors(*(factor.detach().clone() for factor in each)) for name, each in self._factors[run].items()
        }

    def state(self, run: str) -> dict[str, Tensor]:
        """What `load` takes: a run's factors by name, sharing their memory."""
        return {
            f"{name}.{role}": factor.detach()
            for name, each in self._factors[run].items()
            for role, factor in each._asdict().items()
        }

    @torch.no_grad()
    def load(self, run: str, state: Mapping[str, Tensor]) -> None:
        """Take a run's factors from what `state` gave."""
        own = self.state(run)
        if own.keys() != state.keys():
            differing = sorted(own.keys() ^ state.keys())
            raise ValueError(f"LoraStudents.load: state must hold the factors of {run!r}, got others in {differing}")
        for name, factor in own.items():
            factor.copy_(state[name])

    @torch.no_grad()
    def model(self, run: str) -> nn.Module:
        """A copy of the base with a run's factors in its weights, in eval mode, without gradients."""
        model = copy.deepcopy(self._base).to(self._device).eval().requires_grad_(False)
        for name, (up, down) in self._factors[run].items():
            weight = model.get_submodule(name).get_parameter("weight")
            weight.copy_(LowRank(self._scale * up, down).added_to(weight, up.dtype))
        return model


def save_adapter(factors: Mapping[str, Factors], config: TrainConfig, folder: str | os.PathLike[str]) -> None:
    """Write a run's factors as a PEFT adapter, which ``peft.PeftModel.from_pretrained`` and ``DeltaBank.load`` read.

    factors: by the base's names of the layers, as ``LoraStudents.factors`` gives them. config: the run's TrainConfig,
    of which rank and alpha are written. folder: made where it is not there; files of other names stay.

    Raises OSError naming the file. Each file is whole or not there.

    >>> save_adapter(students.factors("cat"), config, "runs/without_cat")  # doctest: +SKIP
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (up, down) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        # The up factor of a convolution is one of a single pixel.
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.view(*up.shape, *(1,) * (down.dim() - 2))
    content = safetensors.torch.save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
    with atomic_write(target / "adapter_model.safetensors", "wb") as file:
        file.write(content)
    with atomic_write(target / "adapter_config.json", "w") as text:
        text.write(json.dumps(_peft_config(factors, config), indent=2) + "\n")


def _peft_config(factors: Collection[str], config: TrainConfig) -> dict[str, Any]:
    """The fields of peft.LoraConfig that are not its defaults, and those that say so plainly."""
    return {
        "peft_type": "LORA",
        "r": config.lora_rank,
        "lora_alpha": config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        # An expression for whole names: of names in a list PEFT compares the ends, and may find more layers.
        "target_modules": "|".join(re.escape(name) for name in factors),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _with_factored(
    base: nn.Module, chosen: Mapping[str, nn.Module], scale: float, device: torch.device
) -> tuple[nn.Module, dict[str, FactoredLayer]]:
    """A network of the base's own parameters, frozen, in which the chosen layers take factors."""
    # What deepcopy finds in its memo it takes as it is: one base in memory, whose owner's gradients stay as they are.
    shared = {id(each): nn.Parameter(each.detach().to(device), requires_grad=False) for each in base.parameters()}
    # In eval mode: one dropout mask over the rows of all runs would make a run depend on its company.
    network = copy.deepcopy(base, dict(shared)).to(device).eval()
    layers: dict[nn.Module, FactoredLayer] = {}
    for name in chosen:
        layer: Any = network.get_submodule(name)
        layers[layer] = FactoredLayer(name, layer, scale)
    for parent in list(network.modules()):
        # Not named_children, which leaves out what is a child for the second time.
        for child, module in parent._modules.items():
            if module in layers and not isinstance(parent, FactoredLayer):
                parent._modules[child] = layers[module]
    return network, {layer.name: layer for layer in layers.values()}


def _first_factors(chosen: Mapping[str, nn.Module], rank: int, seed: int, device: torch.device) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in chosen.items():
        weight = module.get_parameter("weight")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        down = torch.empty(rank, *weight.shape[1:], dtype=dtype, device="cpu")
        # As PEFT and torch's own layers begin: uniform within 1 / sqrt(inputs).
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        factors[name] = Factors(torch.zeros(len(weight), rank, dtype=dtype, device=device), down.to(device))
    return factors


def _trainable(factors: Factors) -> Factors:
    return Factors(*(nn.Parameter(factor.clone()) for factor in factors))
