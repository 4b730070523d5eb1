"""The definition of every op in plain PyTorch: it serves any device, and backends are tested against it."""

from guda_fast.reference.add_noise import add_noise
from guda_fast.reference.attention import attention
from guda_fast.reference.conv3x3 import conv3x3
from guda_fast.reference.delta_conv2d import delta_conv2d
from guda_fast.reference.delta_linear import delta_linear
from guda_fast.reference.denoising_error import denoising_error
from guda_fast.reference.group_norm_silu import group_norm_silu
from guda_fast.reference.philox import noise_words, normals, philox4x32, standard_normals, uniforms

__all__ = [
    "add_noise",
    "attention",
    "conv3x3",
    "delta_conv2d",
    "delta_linear",
    "denoising_error",
    "group_norm_silu",
    "noise_words",
    "normals",
    "philox4x32",
    "standard_normals",
    "uniforms",
]
