"""Expansion of packed weights to numbers that a matrix product takes: the reference in plain torch.

A weight (N, K) is stored as codes of b bits, a little-endian bit stream along K: code i of a row has the bits
b i ... b i + b - 1, and bit j of a row is bit j % 8 of byte j // 8 (so int4 has even channels in the low nibble). Each
group of g channels has a scale and maybe a zero point:

    w_ni = (q_ni - z_nl) s_nl,   l = i // g

q is the code, in two's complement if signed, or the entry of a table. With k bit planes (arXiv:2602.04163), each a bit
stream of its own,

    w_ni = c_nl0 + sum_p c_nlp B_pni,   B in {0, 1}

With a scale per row, t_n, the result is w_ni / t_n, rounded to E4M3 or int8: the weight of a product in 8 bits.
Shapes: codes (N, ceil(K b / 8)) bytes, planes (k, N, ceil(K / 8)) bytes; scales and zero points (N, K / g), (1, 1), or
(ceil(N / 128), K / g) for blocks of 128 rows; coefficients (N, K / g, k + 1); row scales (N, 1); result (N, K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.kernels.fp8 import E4M3, to_fp8
from postgen.kernels.int8 import to_int8

BLOCK_ROWS = 128
"""Rows of a weight that share a scale if there are fewer rows of scales than of codes."""


def codes_of(stream: Tensor, bits: int, channels: int) -> Tensor:
    """Return the codes 0 ... 2^bits - 1 of a bit stream, int32 (..., channels)."""
    first = torch.arange(channels, device=stream.device) * bits
    low = stream[..., first // 8].int()
    # A code may lie in two bytes; the last byte has no next one, and then its own bits are enough.
    high = stream[..., (first // 8 + 1).clamp_max(stream.shape[-1] - 1)].int()
    found: Tensor = ((low | (high << 8)) >> (first % 8).int()) & (2**bits - 1)
    return found


def expand(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    row_scale: Tensor | None,
    bits: int,
    channels: int,
    signed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return the numbers (N, K) that codes represent, in `dtype`; `ops.expand` describes the arguments."""
    found = codes_of(codes.view(torch.uint8), bits, channels)
    if table is not None:
        values = table[found.long()]
    else:
        values = (found - (found >= 2 ** (bits - 1)).int() * 2**bits if signed else found).float()
    if zero is not None:
        values = values - per_channel(zero, *values.shape)
    return finished(values * per_channel(scale, *values.shape), row_scale, dtype)


def expand_planes(
    planes: Tensor, coefficients: Tensor, row_scale: Tensor | None, channels: int, dtype: torch.dtype
) -> Tensor:
    """Return the numbers (N, K) that bit planes represent, in `dtype`; `ops.expand_planes` describes the arguments."""
    rows = planes.shape[1]
    total = per_channel(coefficients[..., 0], rows, channels)
    for plane, stream in enumerate(planes, start=1):
        bit = codes_of(stream, 1, channels)
        total = total + torch.where(bit > 0, per_channel(coefficients[..., plane], rows, channels), 0.0)
    return finished(total, row_scale, dtype)


def per_channel(scale: Tensor, rows: int, channels: int) -> Tensor:
    """Return scales of groups as one float32 number for each number of a weight (rows, channels)."""
    if 1 < scale.shape[0] < rows:
        scale = scale.repeat_interleave(BLOCK_ROWS, 0)[:rows]
    return scale.float().repeat_interleave(channels // scale.shape[1], 1)


def finished(numbers: Tensor, row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return numbers in `dtype`, divided by the scales of their rows and rounded if there are any."""
    if row_scale is None:
        return numbers.to(dtype)
    return to_fp8(numbers, row_scale) if dtype == E4M3 else to_int8(numbers, row_scale)
