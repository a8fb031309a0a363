"""Row-wise quantisation to E4M3 and the product of two such matrices: the reference in plain torch.

This is a linear layer in FP8 without calibration. Each token and each output channel has one scale:

    x_ij ~ s_i a_ij,   s_i = max_j |x_ij| / 448,   y_in = s_i t_n sum_j a_ij w_nj + bias_n

where a and w are rounded to E4M3 (arXiv:2209.05433) and t_n is the scale of output channel n. Both scales are outside
the sum over j, so one matrix product computes it.
Shapes: x (..., K); codes (..., K) and scale (..., 1); weights (N, K) with scale (N, 1); bias (N,); y (..., N).
"""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.kernels.fp8 import fp8_scale, from_fp8, to_fp8


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the rows of x (..., K) to E4M3: codes (..., K) and float32 scales (..., 1).

    Zeros stay zeros. A row with NaN or infinity has a scale that is not finite; it does not affect other rows.
    """
    scale = fp8_scale(x, -1)
    return to_fp8(x, scale), scale


def rows_matmul(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the product of rows and weights in E4M3, (..., N), with float32 sums and one rounding to `dtype`."""
    # Autocast would round the sums to 16 bits.
    with torch.autocast(codes.device.type, enabled=False):
        out = (codes.float() @ weight.float().mT) * scale * weight_scale.view(-1)
        return (out if bias is None else out + bias.float()).to(dtype)


def weight_of(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers (N, K) that weights in E4M3 and their scales represent, rounded to `dtype`."""
    return from_fp8(weight, weight_scale).to(dtype)
