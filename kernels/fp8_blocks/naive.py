"""Linear layers in E4M3 with one scale per 128 numbers of a token and per 128 x 128 numbers of the weight.

The fine scales keep large numbers in one part of a row from costing the others precision (DeepSeek-V3,
arXiv:2412.19437, section 3.3). With K = 128 L:

    x_ij ~ s_li a_ij,   s_li = max_{j in part l} |x_ij| / 448
    y_in = sum_l s_li t_nl sum_{j in part l} a_ij w_nj + bias_n

where a and w are rounded to E4M3 and t_nl is the scale of the block of the weight.
Shapes: x (..., K); codes (..., K) and scale (L, M), where M is the number of all tokens; weights (N, K) with scale
(ceil(N / 128), L); bias (N,); y (..., N). Neighbouring tokens are neighbours in the memory of `scale`, as cuBLAS reads
it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from postgen.kernels.fp8 import fp8_scale, from_fp8, to_fp8

PART = 128
"""Numbers of a token that share one scale, and rows and columns of a block of the weight."""


def quantize_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise parts of 128 numbers of x (..., K) to E4M3: codes (..., K) and float32 scales (K / 128, M)."""
    parts = x.reshape(-1, x.shape[-1] // PART, PART)
    scale = fp8_scale(parts, -1)
    return to_fp8(parts, scale).view(x.shape), scale.squeeze(-1).t().contiguous()


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise blocks of 128 x 128 of a weight (N, K) to E4M3: codes (N, K) and scales (ceil(N / 128), K / 128)."""
    rows, channels = weight.shape
    filled = functional.pad(weight, (0, 0, 0, -rows % PART)).view(-1, PART, channels // PART, PART)
    scale = fp8_scale(filled, (1, 3))
    return to_fp8(filled, scale).view(-1, channels)[:rows].contiguous(), scale.view(-1, channels // PART)


def blocks_matmul(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the product of quantised tokens and weights, (..., N), with float32 sums and one rounding to `dtype`."""
    tokens = from_fp8(codes.reshape(scale.shape[1], scale.shape[0], PART), scale.t().unsqueeze(-1)).view(codes.shape)
    # Autocast would round the sums to 16 bits.
    with torch.autocast(codes.device.type, enabled=False):
        out = tokens @ weight_of(weight, weight_scale, torch.float32).mT
        return (out if bias is None else out + bias.float()).to(dtype)


def weight_of(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers (N, K) that weights in E4M3 and the scales of their blocks represent, rounded to `dtype`."""
    wide = weight_scale.repeat_interleave(PART, 0)[: weight.shape[0]].repeat_interleave(PART, 1)
    return from_fp8(weight, wide).to(dtype)
