"""Rows in E4M3 and the product of two such matrices: the reference.

A linear layer in eight bits, no calibration: a token has one scale, an output channel has one scale,

    x_ij ~ s_i a_ij,   s_i = max_j |x_ij| / 448,   y_in = s_i t_n sum_j a_ij w_nj + bias_n

with a and w rounded to E4M3 (arXiv:2209.05433). Both scales stand outside the sum, so it is one matrix product.
Shapes: x (..., K); codes (..., K) and scale (..., 1); weights (N, K) with scale (N, 1); bias (N,); y (..., N).
"""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.kernels.fp8 import fp8_scale, from_fp8, to_fp8


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of x in E4M3 with their scales, float32.

    Zeros stay zeros; a row with NaN or infinity has a scale that is not finite, and touches no other row.
    """
    scale = fp8_scale(x, -1)
    return to_fp8(x, scale), scale


def rows_matmul(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the product of rows and weights in E4M3, with float32 sums and one rounding to `dtype`."""
    # Mixed precision would round the sums to sixteen bits.
    with torch.autocast(codes.device.type, enabled=False):
        out = (codes.float() @ weight.float().mT) * scale * weight_scale.view(-1)
        return (out if bias is None else out + bias.float()).to(dtype)


def weight_of(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the (N, K) numbers that weights in E4M3 stand for, rounded to `dtype`."""
    return from_fp8(weight, weight_scale).to(dtype)
