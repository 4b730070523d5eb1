"""Modules of diffusers with our ops in them, or without the copies that lose channels-last.

Each stands for its original by class alone. Imports diffusers: imported where modules are fused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from guda_fast import ops
from guda_fast.forward._fused_attention import FusedAttention, is_expressed
from guda_fast.forward._fused_convolution import CONVOLUTIONS, FusedConv2d, is_conv3x3
from guda_fast.forward._original import runs_original


class PerRow(nn.Module):
    """A norm or convolution whose parameters may differ between rows; it answers for the rows that run now."""

    def group_norm_silu(self, x: Tensor, **options: Any) -> Tensor:
        """The op of this name, with a group norm's own parameters; options are the op's."""
        raise NotImplementedError

    def without_bias(self, x: Tensor) -> Tensor:
        """A convolution's result, but for its bias."""
        raise NotImplementedError

    def biases(self) -> Tensor | None:
        """A convolution's bias for each row [(R, O)]."""
        raise NotImplementedError


class FusedUNet2DModel(UNet2DModel):
    """A UNet2DModel that knows its dtype, which diffusers looks for in every module at every call."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


# save_pretrained writes the name of the class.
FusedUNet2DModel.__name__ = UNet2DModel.__name__


class FusedGroupNorm(nn.GroupNorm):
    """A group norm without activation, as in attention."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the original's name)
        # PyTorch's own norm keeps channels-first activations, and is quick on them.
        if runs_original(input) or input.dim() > 5 or input.stride(1) != 1:
            return super().forward(input)
        return _norm(self, input, silu=False)


class FusedUpsample2D(Upsample2D):
    """An Upsample2D that keeps channels-last for batches of 64 and more too."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        x = hidden_states
        norm: nn.Module | None = self.norm
        plain = self.interpolate and norm is None and not self.use_conv_transpose and x.shape[1] == self.channels
        # diffusers copies for kernels that count in 32 bits, which such outputs do not exceed.
        small = output_size is None and 4 * x.numel() < 2**31
        if args or kwargs or not plain or not small or runs_original(x):
            result: Tensor = super().forward(x, output_size, *args, **kwargs)
            return result
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        conv: nn.Module | None = self.conv if self.name == "conv" else self.Conv2d_0
        return x if conv is None else conv(x)


class FusedTransformer2DModel(Transformer2DModel):
    """A Transformer2DModel whose result is channels-last, as its tokens are."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if runs_original(residual) or not residual.is_contiguous(memory_format=torch.channels_last):
            original: Any = super()._get_output_for_continuous_inputs
            result: Tensor = original(hidden_states, residual, batch_size, height, width, inner_dim)
            return result
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        hidden_states = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        return hidden_states + residual


class FusedResnetBlock2D(ResnetBlock2D):
    """A ResnetBlock2D whose norms run with what surrounds them."""

    def forward(self, input_tensor: Tensor, temb: Any, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or runs_original(input_tensor) or not self._can_fuse(temb, len(input_tensor)):
            result: Tensor = super().forward(input_tensor, temb, *args, **kwargs)
            return result
        # A convolution's bias costs a pass of its own on a GPU, and nothing in the norm that follows, nor on a CPU.
        by_norm = input_tensor.is_cuda or isinstance(self.conv1, PerRow)
        hidden: Tensor = self._resampled(_norm(self.norm1, input_tensor))
        hidden = _without_bias(self.conv1, hidden) if by_norm else self.conv1(hidden)
        shortcut = self._resampled(input_tensor)
        hidden = _norm(self.norm2, hidden, *self._vectors(temb, len(hidden), by_norm))
        hidden = self.conv2(self.dropout(hidden))
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)
        # What the convolution gave is ours to write into, unless a hook keeps it.
        hidden = hidden.add_(shortcut) if _is_plain(self.conv2) else hidden + shortcut
        if self.output_scale_factor != 1.0:
            hidden = hidden / self.output_scale_factor
        return hidden

    def _can_fuse(self, temb: Tensor | None, rows: int) -> bool:
        """Nobody watches or replaces the modules that are not called as such, and the result has the input's rows."""
        if temb is not None and len(temb) not in (1, rows):
            return False
        if (temb is None) != (self.time_emb_proj is None) or self.conv1.padding_mode != "zeros":
            return False
        return all(_is_plain(module) for module in (self.norm1, self.nonlinearity, self.conv1, self.norm2))

    def _resampled(self, x: Tensor) -> Tensor:
        if self.upsample is not None:
            x = self.upsample(x)
        elif self.downsample is not None:
            x = self.downsample(x)
        return x

    def _vectors(
        self, temb: Tensor | None, rows: int, biased: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What is added before the second norm, the first convolution's bias too, and the scale and shift after it."""
        added = _biases(self.conv1, rows) if biased else None
        if temb is None:
            return added, None, None
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb)).expand(rows, -1)
        if self.time_embedding_norm == "scale_shift":
            scale, shift = temb.chunk(2, dim=1)
            return added, scale, shift
        return (temb if added is None else temb + added), None, None


_PLAIN = {nn.GroupNorm, FusedGroupNorm, nn.SiLU, *CONVOLUTIONS}


def _is_plain(module: nn.Module) -> bool:
    """Whether calling a module does what its class says and nothing else."""
    watched = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return (type(module) in _PLAIN or isinstance(module, PerRow)) and not watched


def _norm(
    norm: nn.GroupNorm | PerRow,
    x: Tensor,
    addend: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    if isinstance(norm, PerRow):
        return norm.group_norm_silu(x, addend=addend, scale=scale, shift=shift, silu=silu)
    return ops.group_norm_silu(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, addend=addend, scale=scale, shift=shift, silu=silu
    )


def _without_bias(conv: nn.Conv2d | PerRow, x: Tensor) -> Tensor:
    if isinstance(conv, PerRow):
        return conv.without_bias(x)
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def _biases(conv: nn.Conv2d | PerRow, rows: int) -> Tensor | None:
    if isinstance(conv, PerRow):
        return conv.biases()
    return None if conv.bias is None else conv.bias.expand(rows, -1)


def can_fuse(module: nn.Module) -> bool:
    """Whether an op expresses what a module of a type in FUSED computes."""
    if isinstance(module, Attention):
        return is_expressed(module)
    if isinstance(module, nn.Conv2d):
        return is_conv3x3(module)
    if isinstance(module, UNet2DModel):
        # Hooks of diffusers may compute in another dtype than that of the parameters.
        return not any(hasattr(part, "_diffusers_hook") for part in module.modules())
    return not isinstance(module, ResnetBlock2D) or isinstance(module.nonlinearity, nn.SiLU)


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: FusedGroupNorm,
    nn.Conv2d: FusedConv2d,
    Attention: FusedAttention,
    ResnetBlock2D: FusedResnetBlock2D,
    Transformer2DModel: FusedTransformer2DModel,
    UNet2DModel: FusedUNet2DModel,
    Upsample2D: FusedUpsample2D,
}
ORIGINALS = {fused: original for original, fused in FUSED.items()}
