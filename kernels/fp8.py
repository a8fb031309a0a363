"""Scaled FP8 (E4M3) numbers, which FP8 attention and FP8 linear layers share.

The largest E4M3 number (arXiv:2209.05433) is 448, and there is no infinity: casting a larger number returns NaN. So
values are divided by a scale before the cast.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
"""The largest E4M3 number, 448."""
SMALLEST_SCALE = torch.finfo(torch.float32).tiny * 2**32
"""The scale of a tensor of zeros. Its inverse and its product with 448 are finite in float32."""


def scale_to(x: Tensor, most: float, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Compute the scale that maps the largest absolute value along `dim` to `most`.

    Args:
        x: any shape. If x holds NaN or infinity, the scale is not finite.
        most: the largest number of the codes: 448 for E4M3, 127 for int8.
        dim: the axes that share one scale; None computes one scale for the whole tensor.

    Returns:
        float32, with the axes of `dim` kept at size 1, so that it broadcasts against x.
    """
    axes = tuple(range(x.dim())) if dim is None else dim
    largest = x.abs().amax(axes, keepdim=True).float()
    # Divide by a tensor: for a Python number torch's CUDA kernels multiply by its inverse, which rounds differently.
    return (largest / torch.full_like(largest, most)).clamp_min(SMALLEST_SCALE)


def fp8_scale(x: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Compute the scale that maps the largest absolute value along `dim` to 448, as `scale_to` does."""
    return scale_to(x, E4M3_MAX, dim)


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Round x / scale to E4M3, to nearest even; values beyond +-448 become +-448.

    Args:
        x: any shape.
        scale: float32, broadcasts against x.

    Returns:
        E4M3, in the shape of x.
    """
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def from_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 numbers that E4M3 codes and their scale represent (the inverse of `to_fp8`)."""
    return x.float() * scale
