"""Triton functions that scale and round numbers to 8 bits, and the quantisation of rows in one pass.

The operations `fp8_rows`, `int8_rows`, `fp8_blocks` and `hadamard_rows` share them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from postgen.kernels.dispatch import launching_on
from postgen.kernels.fp8 import E4M3, E4M3_MAX, SMALLEST_SCALE
from postgen.kernels.int8 import INT8_MAX

MOST = {E4M3: E4M3_MAX, torch.int8: INT8_MAX}
"""Dtype of the codes -> the largest code."""


@triton.jit
def scale_of(v, AXIS: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """Return the scales that map the largest absolute values of float32 numbers along AXIS (None: all) to LARGEST."""
    # The maximum may ignore NaN, so NaN is detected separately.
    strange = tl.max((v != v).to(tl.int32), axis=AXIS) > 0
    found = tl.maximum(tl.div_rn(tl.max(tl.abs(v), axis=AXIS), LARGEST), SMALLEST)
    return tl.where(strange, float("nan"), found)


@triton.jit
def rounded(v, scale, LARGEST: tl.constexpr, INTEGER: tl.constexpr):
    """Return v / scale within +-LARGEST, as float32; rounded to whole numbers, with 0 for NaN, if INTEGER."""
    # A correctly rounded division as in the reference: multiplying by the inverse would change the codes of numbers
    # halfway between two codes.
    w = tl.div_rn(v, scale)
    w = tl.where(w > LARGEST, LARGEST, tl.where(w < -LARGEST, -LARGEST, w))
    if INTEGER:
        # float32 numbers near 1.5 * 2^23 are whole, so the sum rounds to the nearest whole number, ties to even.
        w = tl.where(w == w, (w + 12582912.0) - 12582912.0, 0.0)
    return w


@triton.jit
def _quantize(
    x, codes, scale, columns, stride,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, INTEGER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantise one row: it is read once, its scale is found, and its codes are written."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    v = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    found = scale_of(v, 0, LARGEST, SMALLEST)
    w = rounded(v, found, LARGEST, INTEGER)
    tl.store(codes + row * columns + column, w.to(codes.dtype.element_ty), mask=inside)
    tl.store(scale + row, found)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise rows of at most 32,768 numbers; row strides need no copy.

    Args:
        x: (..., K), bfloat16, float16 or float32.
        dtype: the dtype of the codes, one of `MOST`.

    Returns:
        Codes (..., K) and float32 scales (..., 1).
    """
    columns = x.shape[-1]
    rows = as_rows(x)
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    with launching_on(x):
        _quantize[(rows.shape[0],)](
            rows, codes, scale, columns, rows.stride(0),
            LARGEST=MOST[dtype], SMALLEST=SMALLEST_SCALE, INTEGER=dtype == torch.int8, BLOCK=block,
            num_warps=warps(block),
        )  # fmt: skip
    return codes, scale


def as_rows(x: Tensor) -> Tensor:
    """Return a tensor (..., K) as a matrix whose rows are contiguous, without a copy where its strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def warps(block: int) -> int:
    """Return the number of warps of a program for a block of `block` numbers.

    A thread holds at most 32 numbers up to a block of 16,384, and 64 at the largest block of 32,768.
    """
    return min(16, max(1, block // 1024))
