"""Rotation of channels by blocks with Hadamard matrices, which spreads outliers over a block.

R = diag(signs) H / sqrt(h) for blocks of h channels, with the symmetric Sylvester matrix H of +1 and -1. R is
orthonormal, so (x R) (W R)^T = x W^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.kernels.hadamard_rows import ops


def rotated(x: Tensor, size: int, signs: Tensor | None = None) -> Tensor:
    """Return x R in float32, or in float64 for float64.

    Args:
        x: (..., K), any floating-point dtype.
        size: channels h of a block, a power of two that divides K; 0 rotates nothing.
        signs: (K,) of +1 and -1; None: all are +1.

    Raises:
        UserError: the block does not divide K.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if not size:
        return x
    check_rotation(size, x.shape[-1])
    return ops.rotate(x, size, signs)


def rotated_back(x: Tensor, size: int, signs: Tensor | None = None) -> Tensor:
    """Return x R^T, the inverse of `rotated`, with the same arguments."""
    found = rotated(x, size)
    return found if signs is None or not size else found * signs.to(found.dtype)


def check_rotation(size: int, channels: int) -> None:
    """Check that blocks of `size` channels divide the channels of a layer.

    Raises:
        UserError: they do not.
    """
    if size and channels % size:
        largest = channels & -channels
        advice = f"at most {largest}" if largest > 1 else "0, which rotates nothing"
        raise UserError(
            f"rotate is {size}, but the layer has {channels} channels: the blocks must divide them, so use {advice}"
        )
