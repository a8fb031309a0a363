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
def divided(v, scale):
    """Return v / scale for positive scales, rounded correctly, from one division for each scale.

    q = v * (1 / scale) is off by a unit of its last place at most. The remainder v - q scale is exact in a fused
    multiply-add, and corrects q. Without the correction, numbers halfway between two codes would get the other code.
    """
    # 0 * infinity is NaN, but a finite number divided by an infinite scale is 0.
    endless = scale == float("inf")
    inverse = tl.where(endless, 0.0, tl.div_rn(1.0, scale))
    divisor = tl.where(endless, 1.0, scale)
    q = v * inverse
    return tl.fma(tl.fma(-q, divisor, v), inverse, q)


@triton.jit
def whole(v):
    """Round float32 numbers below 2^22 to whole numbers, ties to even; NaN becomes 0."""
    # float32 numbers near 1.5 * 2^23 are whole, so the sum rounds.
    return tl.where(v == v, (v + 12582912.0) - 12582912.0, 0.0)


@triton.jit
def rounded(v, scale, INTEGER: tl.constexpr):
    """Return v / scale as float32; rounded to whole numbers, with 0 for NaN, if INTEGER.

    The scale must be that of `scale_of` for these numbers: then no quotient lies beyond the largest code.
    """
    w = divided(v, scale)
    if INTEGER:
        w = whole(w)
    return w


@triton.jit
def _quantize(
    x, codes, scale, columns, stride,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, INTEGER: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Quantise one row: its chunks are read once and kept in registers, its scale is found, and its codes are written.

    Only the last chunk needs a mask, and none does if WHOLE.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CHUNK)
    held = ()  # type: tuple[tl.tensor, ...]
    most = tl.zeros((CHUNK,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        at = x + row * stride + chunk * CHUNK + column
        if WHOLE or chunk + 1 < CHUNKS:
            v = tl.load(at)
        else:
            v = tl.load(at, mask=chunk * CHUNK + column < columns, other=0.0)
        held = held + (v,)  # noqa: RUF005  (Triton has no star)
        most = tl.maximum(most, tl.abs(v.to(tl.float32)), propagate_nan=tl.PropagateNan.ALL)
    found = scale_of(most, 0, LARGEST, SMALLEST)
    for chunk in tl.static_range(CHUNKS):
        w = rounded(held[chunk].to(tl.float32), found, INTEGER).to(codes.dtype.element_ty)
        at = codes + row * columns + chunk * CHUNK + column
        if WHOLE or chunk + 1 < CHUNKS:
            tl.store(at, w)
        else:
            tl.store(at, w, mask=chunk * CHUNK + column < columns)
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
    chunk, chunks = chunks_of(columns)
    with launching_on(x):
        _quantize[(rows.shape[0],)](
            rows, codes, scale, columns, rows.stride(0),
            LARGEST=MOST[dtype], SMALLEST=SMALLEST_SCALE, INTEGER=dtype == torch.int8,
            CHUNK=chunk, CHUNKS=chunks, WHOLE=columns % chunk == 0, num_warps=warps(chunk),
        )  # fmt: skip
    return codes, scale


def chunks_of(columns: int) -> tuple[int, int]:
    """Return the length of the chunks of a row, a power of two, and how many a row has.

    Chunks are long, but at most a sixteenth of the work is for numbers beyond the end of the row, if the row is long
    enough for that.
    """
    for chunk in (2048, 1024, 512):
        beyond = -columns % chunk
        if chunk <= columns and 16 * beyond <= columns:
            return chunk, (columns + beyond) // chunk
    chunk = min(256, int(triton.next_power_of_2(columns)))
    return chunk, -(-columns // chunk)


def as_rows(x: Tensor) -> Tensor:
    """Return a tensor (..., K) as a matrix whose rows are contiguous, without a copy where its strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def warps(chunk: int) -> int:
    """Return the number of warps of a program: a thread loads 16 bytes of a chunk of 16-bit numbers."""
    return max(1, chunk // 256)
