"""Rows in E4M3 in one pass: a program reads a row, finds its scale, and writes its codes. No number is read twice."""

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
    # A maximum may leave NaN out, so it is looked for by itself.
    strange = tl.max((v != v).to(tl.int32), axis=0) > 0
    found = tl.maximum(tl.div_rn(tl.max(tl.abs(v), axis=0), LARGEST), SMALLEST)
    found = tl.where(strange, float("nan"), found)
    # As in the reference, correctly rounded: a product with the inverse would move numbers that lie between two codes.
    w = tl.div_rn(v, found)
    w = tl.where(w > LARGEST, LARGEST, tl.where(w < -LARGEST, -LARGEST, w))
    tl.store(codes + row * columns + column, w.to(codes.dtype.element_ty), mask=inside)
    tl.store(scale + row, found)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `naive.quantize_rows`; `ops.py` has checked that a row fits. Gaps between rows cost no copy."""
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
    """Return the warps of a program with so many numbers: at most 64 numbers in the registers of a thread."""
    return min(16, max(1, block // 1024))
