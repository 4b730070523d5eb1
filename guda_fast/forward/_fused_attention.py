"""Attention of diffusers with the op `attention` in it.

Imports diffusers: imported where modules are fused.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

from guda_fast import ops
from guda_fast.forward._original import runs_original

_PROCESSORS = {AttnProcessor, AttnProcessor2_0}
# What the op does not express: norms besides the group norm, and projections of a second sequence.
_ABSENT = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_q_proj", "add_k_proj", "add_v_proj")


class FusedAttention(Attention):
    """Self- or cross-attention whose heads run as one op, and whose result has the memory layout of its input.

    The projections are called as modules: they may be hooked or replaced.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        # The time embedding is the spatial norm's.
        known = attention_mask is None and kwargs.keys() <= {"temb"} and hidden_states.dim() in (3, 4)
        if not known or runs_original(hidden_states) or not is_expressed(self):
            result: Tensor = super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
            return result
        is_map = hidden_states.dim() == 4
        # (B, C, H, W) in channels-last is (B, H W, C) in memory: these are views, there and back.
        hidden = hidden_states.flatten(2).transpose(1, 2) if is_map else hidden_states
        if self.group_norm is not None:
            hidden = self.group_norm(hidden.transpose(1, 2)).transpose(1, 2)
        context = hidden if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (self._by_head(tokens) for tokens in (self.to_q(hidden), self.to_k(context), self.to_v(context)))
        # The older processor alone reads the attribute.
        scale = self.scale if type(self.processor) is AttnProcessor else None
        hidden = ops.attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
        projected: Tensor = self.to_out[1](self.to_out[0](hidden))
        if is_map:
            projected = projected.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        if self.residual_connection:
            projected = projected + hidden_states
        return projected if self.rescale_output_factor == 1.0 else projected / self.rescale_output_factor

    def _by_head(self, tokens: Tensor) -> Tensor:
        split: Tensor = tokens.unflatten(2, (self.heads, -1))
        return split.transpose(1, 2)


def is_expressed(attention: Attention) -> bool:
    """Whether an attention computes what its projections and the op do, as its processor is now."""
    plain = type(attention.processor) in _PROCESSORS and attention.inner_dim == attention.inner_kv_dim
    if not plain or attention.to_k is None or attention.to_out is None:
        return False
    return all(getattr(attention, name, None) is None for name in _ABSENT)
