"""The ops: each validates its arguments, chooses a backend and runs it."""

from guda_fast.ops.add_noise import add_noise
from guda_fast.ops.attention import attention
from guda_fast.ops.conv3x3 import conv3x3
from guda_fast.ops.delta_conv2d import delta_conv2d
from guda_fast.ops.delta_linear import delta_linear
from guda_fast.ops.denoising_error import denoising_error
from guda_fast.ops.group_norm_silu import group_norm_silu
from guda_fast.reference.denoising_error import DenoisingError

__all__ = [
    "DenoisingError",
    "add_noise",
    "attention",
    "conv3x3",
    "delta_conv2d",
    "delta_linear",
    "denoising_error",
    "group_norm_silu",
]
