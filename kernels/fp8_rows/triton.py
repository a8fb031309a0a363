"""Row-wise quantisation to E4M3 in one pass: each program reads one row once, finds its scale and writes its codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from postgen.kernels.dispatch import launching_on
from postgen.kernels.fp8 import E4M3, E4M3_MAX, SMALLEST_SCALE


@triton.jit
def _quantize(x, codes, scale, columns, stride, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    v = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    # The maximum may ignore NaN, so NaN is detected separately.
    strange = tl.max((v != v).to(tl.int32), axis=0) > 0
    found = tl.maximum(tl.div_rn(tl.max(tl.abs(v), axis=0), LARGEST), SMALLEST)
    found = tl.where(strange, float("nan"), found)
    # A correctly rounded division as in the reference: multiplying by the inverse would change the codes of numbers
    # halfway between two codes.
    w = tl.div_rn(v, found)
    w = tl.where(w > LARGEST, LARGEST, tl.where(w < -LARGEST, -LARGEST, w))
    tl.store(codes + row * columns + column, w.to(codes.dtype.element_ty), mask=inside)
    tl.store(scale + row, found)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `naive.quantize_rows` for rows of at most `ops.MAX_CHANNELS` numbers; row strides need no copy."""
    columns = x.shape[-1]
    rows = x.reshape(-1, columns)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    codes = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    with launching_on(x):
        _quantize[(rows.shape[0],)](
            rows, codes, scale, columns, rows.stride(0),
            LARGEST=E4M3_MAX, SMALLEST=SMALLEST_SCALE, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
    return codes, scale


def warps(block: int) -> int:
    """Return the number of warps of a program for a block of `block` numbers.

    A thread holds at most 32 numbers up to a block of 16,384, and 64 at the largest block of 32,768.
    """
    return min(16, max(1, block // 1024))
