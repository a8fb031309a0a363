"""Quantisation of parts of 128 numbers to E4M3 in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from postgen.kernels.dispatch import launching_on
from postgen.kernels.fp8 import E4M3, E4M3_MAX, SMALLEST_SCALE
from postgen.kernels.fp8_blocks.naive import PART
from postgen.kernels.triton_rows import as_rows, rounded, scale_of

_TOKENS = 32
"""Tokens of a program: 32 threads of four warps read 16 bytes each of one part of eight tokens at a time."""


@triton.jit
def _quantize(
    x, codes, scale, tokens, columns, stride,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantise one part of some tokens."""
    part = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = part * PART + tl.arange(0, PART)
    inside = (token < tokens)[:, None] & (column >= 0)[None, :]
    row = token.to(tl.int64)[:, None]
    v = tl.load(x + row * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    found = scale_of(v, 1, LARGEST, SMALLEST)
    w = rounded(v, found[:, None], False)
    tl.store(codes + row * columns + column[None, :], w.to(codes.dtype.element_ty), mask=inside)
    tl.store(scale + part.to(tl.int64) * tokens + token, found, mask=token < tokens)


def quantize_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `naive.quantize_parts`; strides between tokens need no copy."""
    rows = as_rows(x)
    tokens, columns = rows.shape
    codes = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scale = torch.empty((columns // PART, tokens), dtype=torch.float32, device=x.device)
    with launching_on(x):
        _quantize[triton.cdiv(tokens, _TOKENS), columns // PART](
            rows, codes, scale, tokens, columns, rows.stride(0),
            LARGEST=E4M3_MAX, SMALLEST=SMALLEST_SCALE, PART=PART, BLOCK=_TOKENS, num_warps=4,
        )  # fmt: skip
    return codes, scale
