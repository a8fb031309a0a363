"""Row-wise quantisation to int8 and the product of two such matrices: the reference in plain torch.

This is a linear layer in INT8 without calibration. Each token and each output channel has one scale:

    x_ij ~ s_i a_ij,   s_i = max_j |x_ij| / 127,   y_in = s_i t_n sum_j a_ij w_nj + bias_n

where a and w are whole numbers -127 ... 127 and t_n is the scale of output channel n. The sums over j are exact.
Shapes: x (..., K); codes (..., K) and scale (..., 1); weights (N, K) with scale (N, 1); bias (N,); y (..., N).
"""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.kernels.int8 import from_int8, int8_scale, to_int8

_EXACT = 1024
"""Products of two codes that float32 can add exactly: 1024 * 127^2 < 2^24."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the rows of x (..., K) to int8: codes (..., K) and float32 scales (..., 1).

    A row with NaN or infinity has a scale that is not finite; it does not affect other rows.
    """
    scale = int8_scale(x, -1)
    return to_int8(x, scale), scale


def rows_matmul(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the product of rows and weights in int8, (..., N), with exact sums and one rounding to `dtype`."""
    sums = torch.zeros(*codes.shape[:-1], weight.shape[0], dtype=torch.int32, device=codes.device)
    # Autocast would round the sums to 16 bits.
    with torch.autocast(codes.device.type, enabled=False):
        for some, others in zip(codes.split(_EXACT, -1), weight.split(_EXACT, -1), strict=True):
            sums += (some.float() @ others.float().mT).to(torch.int32)
        out = sums.float() * scale * weight_scale.view(-1)
        return (out if bias is None else out + bias.float()).to(dtype)


def weight_of(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers (N, K) that int8 weights and their scales represent, rounded to `dtype`."""
    return from_int8(weight, weight_scale).to(dtype)
