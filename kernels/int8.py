"""Scaled int8 numbers, which linear layers in INT8 and rotated rows share.

The codes are symmetric, -127 ... 127: the number -128 would bias the mean (arXiv:2510.25602, section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.kernels.fp8 import scale_to

INT8_MAX = 127.0
"""The largest code."""


def int8_scale(x: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Compute the scale that maps the largest absolute value along `dim` to 127, as `fp8.scale_to` does."""
    return scale_to(x, INT8_MAX, dim)


def to_int8(x: Tensor, scale: Tensor) -> Tensor:
    """Round x / scale to int8, to nearest even; values beyond +-127 become +-127, and NaN becomes 0.

    Args:
        x: any shape.
        scale: float32, broadcasts against x.

    Returns:
        int8, in the shape of x.
    """
    return (x.float() / scale).round().clamp(-INT8_MAX, INT8_MAX).nan_to_num(0.0).to(torch.int8)


def from_int8(x: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 numbers that int8 codes and their scale represent (the inverse of `to_int8`)."""
    return x.float() * scale
