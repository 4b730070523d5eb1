"""The residual block of diffusers with `group_norm_silu`. Imports diffusers: imported where blocks are fused."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from guda_fast import ops


class FusedResnetBlock2D(ResnetBlock2D):
    """A ResnetBlock2D whose norms run with what surrounds them; made by `fuse` alone."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or torch.is_grad_enabled():
            result: Tensor = super().forward(input_tensor, temb, *args, **kwargs)
            return result
        hidden: Tensor = self.conv1(self._resampled(_norm_silu(self.norm1, input_tensor)))
        shortcut = self._resampled(input_tensor)
        hidden = _norm_silu(self.norm2, hidden, *self._time_vectors(temb))
        hidden = self.conv2(self.dropout(hidden))
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)
        # The convolution's result is ours to write into.
        hidden += shortcut
        return hidden if self.output_scale_factor == 1.0 else hidden / self.output_scale_factor

    def _resampled(self, x: Tensor) -> Tensor:
        if self.upsample is not None:
            x = self.upsample(x)
        elif self.downsample is not None:
            x = self.downsample(x)
        return x

    def _time_vectors(self, temb: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What the time embedding adds before the second norm, and its scale and shift after it."""
        if self.time_emb_proj is not None:
            assert temb is not None, "a block with a projection is given a time embedding"
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            if temb is None:
                raise ValueError("ResnetBlock2D: temb must be a tensor where time_embedding_norm is 'scale_shift'")
            scale, shift = temb.chunk(2, dim=1)
            return None, scale, shift
        return temb, None, None


def _norm_silu(
    norm: nn.GroupNorm,
    x: Tensor,
    addend: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    return ops.group_norm_silu(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, addend=addend, scale=scale, shift=shift
    )


def reason_against(block: ResnetBlock2D) -> str | None:
    """Why a block cannot be fused, or None."""
    if not isinstance(block.nonlinearity, nn.SiLU):
        return f"its activation is {type(block.nonlinearity).__name__}"
    return None
