"""Puts `group_norm_silu` into the residual blocks of a diffusers model, and takes it out again."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

ModelT = TypeVar("ModelT", bound=nn.Module)


def fuse(model: ModelT) -> ModelT:
    """Make every ResnetBlock2D of a diffusers model run its group norms, time embedding and SiLU as one op.

    Blocks change their class in place and nothing else: parameters, buffers, hooks and the keys of the state
    dict stay as they are, so that a delta that is written into the parameters is seen. Blocks that the op cannot
    express (another activation, a subclass) are left alone. While gradients are recorded, a fused block runs the
    original's operations. A model that is fused already stays so.

    model: changed in place

    Returns model. Raises TypeError where it is no module.

    >>> from diffusers import UNet2DModel
    >>> unet = UNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
    ...                    up_block_types=("UpBlock2D",) * 2)
    >>> len(fused_blocks(fuse(unet))), len(fused_blocks(unfuse(unet)))
    (12, 0)
    """
    from diffusers.models.resnet import ResnetBlock2D

    from guda_fast.forward._fused_resnet import FusedResnetBlock2D, reason_against

    for block in _modules("fuse", model):
        if type(block) is ResnetBlock2D and reason_against(block) is None:
            block.__class__ = FusedResnetBlock2D
    return model


def unfuse(model: ModelT) -> ModelT:
    """Undo `fuse`: every block runs diffusers' own code again.

    model: changed in place

    Returns model. Raises TypeError where it is no module.
    """
    from diffusers.models.resnet import ResnetBlock2D

    _modules("unfuse", model)
    for name in fused_blocks(model):
        model.get_submodule(name).__class__ = ResnetBlock2D
    return model


def fused_blocks(model: nn.Module) -> list[str]:
    """The names of the blocks that are fused now."""
    from guda_fast.forward._fused_resnet import FusedResnetBlock2D

    return [name for name, block in model.named_modules() if isinstance(block, FusedResnetBlock2D)]


def _modules(where: str, model: object) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    return list(model.modules())
