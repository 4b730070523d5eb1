"""Networks with adapters that PEFT made, and what the library's own forward says of a bank that read them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from guda_fast.deltas import DeltaBank
from guda_fast.deltas.delta import LowRank
from guda_fast.deltas.weights import named_tensors
from guda_fast.forward._routing import RowModels
from guda_fast.forward.batched import BatchedModel

EPSILON = torch.finfo(torch.float32).eps
CLASSES = 5


def unet(**options: Any) -> nn.Module:
    """A UNet2DModel, the same in every call."""
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes: dict[str, Any] = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1}
    return _seeded(UNet2DModel, {**sizes, **blocks, "norm_num_groups": 4, **options})


def conditional(**options: Any) -> nn.Module:
    """A UNet2DConditionModel like Stable Diffusion's, the same in every call."""
    sizes: dict[str, Any] = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    fixed = {"norm_num_groups": 4, "cross_attention_dim": 12, "attention_head_dim": 4}
    return _seeded(UNet2DConditionModel, {**sizes, **blocks, **fixed, **options})


def _seeded(make: Callable[..., nn.Module], options: Mapping[str, Any]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(make(**options))


def randomised(model: nn.Module, seed: int = 0, only: str = "") -> nn.Module:
    """The model with noise on the parameters whose names have ``only`` in them."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return model.eval()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The names that a reader of adapters takes."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}


def merged(injected: nn.Module) -> nn.Module:
    """A copy of a network with adapters, with these added into its weights by the library."""
    other = copy.deepcopy(injected)
    for module in other.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return other


def plain_weights(injected: nn.Module) -> dict[str, Tensor]:
    """The weights of a network with adapters after the library merged them in float64, by the base's names."""
    found: dict[str, Tensor] = {}
    for name, tensor in merged(copy.deepcopy(injected).double()).named_parameters():
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        if ".lora_" not in name and ".original_module." not in name:
            found[plain] = tensor.detach()
    return found


def check_weights(base: nn.Module, bank: DeltaBank, injected: nn.Module) -> None:
    """The bank's differences are the library's, to the rounding of their factors and of one product in float32."""
    theirs, parts = plain_weights(injected), bank.deltas[0].parts
    values = named_tensors(base)
    changed = {name for name, value in theirs.items() if not torch.equal(value, values[name].double())}
    assert parts.keys() == changed and changed
    for name, part in parts.items():
        delta, theta_0 = theirs[name] - values[name].detach().double(), values[name].detach().double()
        if isinstance(part, LowRank):
            # The scale is rounded, multiplied, and the product is a sum of r terms.
            terms = part.up.double().abs() @ part.down.double().abs().flatten(1)
            bound = (part.rank + 3) * EPSILON * terms.view(theta_0.shape)
        else:
            bound = 3 * EPSILON * (delta.abs() + theta_0.abs())
        assert bool((part.full(theta_0.shape).double() - delta).abs().le(bound).all()), name


def check_forwards(base: nn.Module, bank: DeltaBank, injected: nn.Module) -> None:
    """The bank's model is at most twice as far from float64 as the library, merged or not; the batched one too."""
    x, timestep, given = inputs(base)
    exact, _, bound = _expected(base, injected)
    with bank.applied("g") as model:
        assert rms(run(model, x, timestep, given) - exact) <= bound
    check_batched(base, bank, injected)


def check_batched(base: nn.Module, bank: DeltaBank, injected: nn.Module) -> None:
    """A row of the counterfactual and one of the base in one forward, to the same bound."""
    x, timestep, given = inputs(base)
    exact, plain, bound = _expected(base, injected)
    batched = BatchedModel(bank, example=(x, timestep, given))
    found = batched(x, timestep, RowModels(model=[1, 0], sample=[0, 1], timestep=[7, 30], condition=[0, 1]), **given)
    assert rms(found[0] - exact[0]) <= bound
    assert rms(found[1] - plain[1]) <= bound


def _expected(base: nn.Module, injected: nn.Module) -> tuple[Tensor, Tensor, float]:
    """The predictions of counterfactual and base in float64, and twice the library's error in float32."""
    x, timestep, given = inputs(base)
    exact, plain = (run(copy.deepcopy(net).double(), x.double(), timestep, given) for net in (injected, base))
    error = max(rms(run(model, x, timestep, given) - exact) for model in (injected, merged(injected)))
    assert rms(plain - exact) > 1e3 * error > 0  # else equality would say nothing of the adapter
    return exact, plain, 2 * error


def inputs(model: nn.Module) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Two rows for a network, with conditions where it takes some."""
    random = torch.Generator().manual_seed(5)
    x = torch.randn(2, model.config.in_channels, 8, 8, generator=random)
    given: dict[str, Any] = {}
    if model.config.num_class_embeds is not None:
        given["class_labels"] = torch.tensor([1, 2])
    if isinstance(model, UNet2DConditionModel):
        given["encoder_hidden_states"] = torch.randn(2, 3, 12, generator=random)
        if model.config.addition_embed_type is not None:
            embeds, times = torch.randn(2, 10, generator=random), torch.arange(12.0).view(2, 6)
            given["added_cond_kwargs"] = {"text_embeds": embeds, "time_ids": times}
    return x, torch.tensor([7, 30]), given


def run(model: nn.Module, x: Tensor, timestep: Tensor, given: Mapping[str, Any]) -> Tensor:
    """The network's prediction, with conditions in the dtype of ``x``."""
    with torch.no_grad():
        out: Tensor = model(x, timestep, **_like(given, x.dtype), return_dict=False)[0]
    return out


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _like(given: Any, dtype: torch.dtype) -> Any:
    if isinstance(given, Mapping):
        return {name: _like(value, dtype) for name, value in given.items()}
    return given.to(dtype) if given.is_floating_point() else given
