"""Saliency masks: the elements that matter most to what is to be forgotten."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def largest(gradients: Sequence[Tensor | None], like: Sequence[Tensor], share: float) -> list[Tensor]:
    """The elements of the largest |gradient| of each tensor, at least one [bool, as ``like``].

    gradients: None where a tensor has no part in the loss: nothing of it is chosen. share: [> 0..1].

    Source: Fan et al. 2024 (SalUn), eq. 3, with the threshold as a share of each tensor.
    """
    return [_mask(gradient, tensor, share) for gradient, tensor in zip(gradients, like, strict=True)]


def _mask(gradient: Tensor | None, tensor: Tensor, share: float) -> Tensor:
    mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    if gradient is not None:
        count = max(1, round(share * tensor.numel()))
        mask[gradient.reshape(-1).abs().topk(count).indices] = True
    return mask.view(tensor.shape)
