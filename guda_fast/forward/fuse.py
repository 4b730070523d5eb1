"""Puts our ops into a diffusers model, keeps its activations channels-last, and takes both out again."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

ModelT = TypeVar("ModelT", bound=nn.Module)


def fuse(model: ModelT) -> ModelT:
    """Make a UNet of diffusers run its group norms with what surrounds them, in channels-last throughout.

    Residual blocks run norm, time embedding, scale, shift and SiLU as one op, and the first convolution's bias with
    it; other group norms, as in attention, run as the op without SiLU. Attention without a mask runs its heads as the
    op `attention`, between projections that are called as before. 3x3 convolutions that keep height and width run as
    the op `conv3x3` in float32 on a CPU.
    Upsample2D and Transformer2DModel no longer copy channels-last activations into channels-first, and a UNet2DModel no
    longer asks every module for its dtype at each call.

    Modules change their class in place and nothing else: parameters, buffers, hooks and the keys of the state dict
    stay as they are, so that a delta that is written into the parameters is seen. Left alone is what the ops cannot
    express (another activation, norms of queries) and every subclass. While gradients are recorded or autocast is on,
    fused modules run the original's operations; so do all under hooks for every module, a residual block with hooks on
    the norms and convolutions inside, and an attention with a mask or another processor. A model that is fused already
    stays so.

    model: changed in place; its speed is in channels-last, ``model.to(memory_format=torch.channels_last)``

    Returns model. Raises TypeError where it is no module.

    >>> from diffusers import UNet2DModel
    >>> unet = UNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
    ...                    up_block_types=("UpBlock2D",) * 2)
    >>> "mid_block.resnets.0" in fused_blocks(fuse(unet)), fused_blocks(unfuse(unet))
    (True, [])
    """
    from guda_fast.forward._fused_modules import FUSED, can_fuse

    for module in _modules("fuse", model):
        fused = FUSED.get(type(module))
        if fused is not None and can_fuse(module):
            module.__class__ = fused
    return model


def unfuse(model: ModelT) -> ModelT:
    """Undo `fuse`: every module runs its own code again.

    model: changed in place

    Returns model. Raises TypeError, with nothing changed, where it is no module, or where a fused module was made
    into another class since, as parametrizations do.
    """
    from guda_fast.forward._fused_modules import ORIGINALS

    fused = [module for module in _modules("unfuse", model) if isinstance(module, tuple(ORIGINALS))]
    for module in fused:
        if type(module) not in ORIGINALS:
            raise TypeError(
                f"unfuse: fused modules must be of the class that fuse gave them, got {type(module).__name__}, "
                "as parametrizations make: remove those first"
            )
    for module in fused:
        module.__class__ = ORIGINALS[type(module)]
    return model


def fused_blocks(model: nn.Module) -> list[str]:
    """The names of the modules that are fused now."""
    from guda_fast.forward._fused_modules import ORIGINALS

    _modules("fused_blocks", model)
    return [name for name, module in model.named_modules() if isinstance(module, tuple(ORIGINALS))]


def _modules(where: str, model: object) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    return list(model.modules())
