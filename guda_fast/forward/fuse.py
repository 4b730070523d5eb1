"""Puts `group_norm_silu` into a diffusers model, keeps its activations channels-last, and takes both out again."""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

from torch import nn

ModelT = TypeVar("ModelT", bound=nn.Module)


def fuse(model: ModelT) -> ModelT:
    """Make a UNet of diffusers run its group norms with what surrounds them, in channels-last throughout.

    Residual blocks run norm, time embedding, scale, shift and SiLU as one op, and the first convolution's bias with
    it; a UNet's last norm takes its SiLU along; other group norms, as in attention, run as the op without SiLU.
    Upsample2D and Transformer2DModel no longer copy channels-last activations into channels-first.

    Modules change their class in place and nothing else: parameters, buffers, hooks and the keys of the state dict
    stay as they are, so that a delta that is written into the parameters is seen. Left alone is what the op cannot
    express (another activation) and every subclass. While gradients are recorded or autocast is on, fused modules
    run the original's operations; so does a residual block with hooks on the norms and convolutions inside. Hooks on
    a UNet's `conv_norm_out` see the result of its SiLU. A model that is fused already stays so.

    model: changed in place; its speed is in channels-last, ``model.to(memory_format=torch.channels_last)``

    Returns model. Raises TypeError where it is no module.

    >>> from diffusers import UNet2DModel
    >>> unet = UNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
    ...                    up_block_types=("UpBlock2D",) * 2)
    >>> "mid_block.resnets.0" in fused_blocks(fuse(unet)), fused_blocks(unfuse(unet))
    (True, [])
    """
    from guda_fast.forward._fused_modules import FUSED, can_fuse

    modules = _modules("fuse", model)
    _fuse_last_norms(modules)
    for module in modules:
        fused = FUSED.get(type(module))
        if fused is not None and can_fuse(module):
            module.__class__ = fused
    return model


def _fuse_last_norms(modules: list[nn.Module]) -> None:
    """The pairs of a norm and a SiLU that UNets call one after the other."""
    from diffusers import UNet2DConditionModel, UNet2DModel

    from guda_fast.forward._fused_modules import AppliedSiLU, FusedGroupNormSiLU

    unets: tuple[type, ...] = (UNet2DModel, UNet2DConditionModel)
    parents = Counter(id(child) for module in modules for child in module._modules.values())
    for module in modules:
        if type(module) not in unets:
            continue
        norm, activation = module.conv_norm_out, module.conv_act
        if type(norm) is nn.GroupNorm and type(activation) is nn.SiLU and parents[id(activation)] == 1:
            norm.__class__, activation.__class__ = FusedGroupNormSiLU, AppliedSiLU


def unfuse(model: ModelT) -> ModelT:
    """Undo `fuse`: every module runs its own code again.

    model: changed in place

    Returns model. Raises TypeError where it is no module.
    """
    from guda_fast.forward._fused_modules import ORIGINALS

    for module in _modules("unfuse", model):
        original = ORIGINALS.get(type(module))
        if original is not None:
            module.__class__ = original
    return model


def fused_blocks(model: nn.Module) -> list[str]:
    """The names of the modules that are fused now."""
    from guda_fast.forward._fused_modules import ORIGINALS

    _modules("fused_blocks", model)
    return [name for name, module in model.named_modules() if type(module) in ORIGINALS]


def _modules(where: str, model: object) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    return list(model.modules())
