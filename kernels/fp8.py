"""Numbers of eight bits with a scale: what attention and linear layers in FP8 share.

E4M3 (arXiv:2209.05433) holds +-448 and no infinity: a cast of a larger number gives NaN, so values are scaled first.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
"""448."""
SMALLEST_SCALE = torch.finfo(torch.float32).tiny * 2**32
"""The scale of zeros: its inverse, and 448 times it, are finite in float32."""


def fp8_scale(x: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Return the scale by which the largest number along `dim` becomes 448: float32, broadcasts against x.

    Args:
        x: numbers; NaN and infinity stay visible as a scale that is not finite.
        dim: axes that share a scale; None for one scale of all.
    """
    axes = tuple(range(x.dim())) if dim is None else dim
    largest = x.abs().amax(axes, keepdim=True).float()
    # By a tensor: torch's CUDA kernels multiply by the inverse of a number, which is another float on some rows.
    return (largest / torch.full_like(largest, E4M3_MAX)).clamp_min(SMALLEST_SCALE)


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Round x / scale to E4M3, to nearest even; what lies beyond +-448 becomes +-448.

    Args:
        x: numbers of any shape.
        scale: float32, broadcasts against x.
    """
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def from_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 numbers that `to_fp8` stands for."""
    return x.float() * scale
