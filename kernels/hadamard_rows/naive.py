"""Rotation of the channels of rows by Hadamard blocks, and the row-wise quantisation of the rotated rows.

    y = x R,   R = diag(d) (I (x) H_h / sqrt(h)),   H_1 = 1,   H_2h = [[H_h, H_h], [H_h, -H_h]]

where h is the number of channels of a block, a power of two that divides K, and d are signs (all 1 by default). R is
orthogonal, so rotating the inputs and the weights of a linear layer keeps its result: (x R) (W R)^T = x W^T. It
spreads large numbers of single channels over their blocks, which lowers the error of integer codes (arXiv:2404.00456;
for small blocks arXiv:2510.25602).
Shapes: x (..., K); signs (K,); y and codes (..., K); scale (..., 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.kernels.fp8 import E4M3, fp8_scale, to_fp8
from postgen.kernels.int8 import int8_scale, to_int8


def rotate(x: Tensor, block: int, signs: Tensor | None = None) -> Tensor:
    """Return x R (..., K) in the dtype of x, computed in float32 (float64 for float64) and rounded once.

    Args:
        x: (..., K); gradients pass through.
        block: channels of a Hadamard block, a power of two that divides K; 1 only applies the signs.
        signs: (K,), numbers -1 and 1, or None.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    turned = x.to(dtype) if signs is None else x.to(dtype) * signs.to(dtype)
    matrix = hadamard(block, x.device).to(dtype)
    # Autocast would round the sums to 16 bits.
    with torch.autocast(x.device.type, enabled=False):
        turned = turned.unflatten(-1, (-1, block)) @ matrix
    found: Tensor = turned.flatten(-2) * block**-0.5
    return found.to(x.dtype)


def rotate_back(y: Tensor, block: int, signs: Tensor | None = None) -> Tensor:
    """Return y R^T, the inverse of `rotate`; the arguments are those of `rotate`."""
    back = rotate(y, block)
    return back if signs is None else back * signs.to(back.dtype)


def rotate_quantize(x: Tensor, block: int, signs: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise the rows of x R to `dtype` (E4M3 or int8): codes (..., K) and float32 scales (..., 1)."""
    turned = rotate(x.float(), block, signs)
    if dtype == E4M3:
        scale = fp8_scale(turned, -1)
        return to_fp8(turned, scale), scale
    scale = int8_scale(turned, -1)
    return to_int8(turned, scale), scale


def hadamard(size: int, device: torch.device | None = None) -> Tensor:
    """Return the Hadamard matrix H_h (h, h) of -1 and 1, float32, computed on a device; h is a power of two.

    Entry (i, j) is -1 where i and j have an odd number of 1 bits in common. The matrix is not cached: one that was
    made in inference mode could not be used in training, and a copy from the CPU would make the GPU wait.
    """
    index = torch.arange(size, device=device)
    common = index[:, None] & index
    for shift in (8, 4, 2, 1):
        common = common ^ (common >> shift)
    return 1.0 - 2.0 * (common & 1)
