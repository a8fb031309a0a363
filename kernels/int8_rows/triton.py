"""Row-wise quantisation to int8, and the product in int8 whose kernel also applies scales, bias and rounding."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from postgen.kernels import triton_rows
from postgen.kernels.dispatch import DTYPES, launching_on
from postgen.kernels.triton_rows import as_rows


class Tiles(NamedTuple):
    """The sizes of a program of the product, and how Triton compiles it."""

    rows: int
    columns: int
    terms: int
    warps: int
    stages: int


LARGE = Tiles(128, 256, 128, 8, 3)
"""For Hopper: 147 KB of shared memory."""
USUAL = Tiles(128, 128, 64, 8, 3)
"""For GPUs with less shared memory: 48 KB."""
FEW = Tiles(32, 128, 128, 4, 4)
"""For few tokens."""
_TOGETHER = 8
"""Tiles of rows that run one after the other over all columns, so that the L2 cache still holds their weights."""


@triton.jit
def _product(
    x, weight, x_scale, weight_scale, bias, out, m, n, k, x_m, w_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Compute one tile of x @ weight^T in int32, then scale it by rows and columns, add the bias and round it."""
    program = tl.program_id(0)
    tiles_n = tl.cdiv(n, BLOCK_N)
    first = program // (TOGETHER * tiles_n) * TOGETHER
    size = tl.minimum(tl.cdiv(m, BLOCK_M) - first, TOGETHER)
    inside = program % (TOGETHER * tiles_n)
    row = (first + inside % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = inside // size * BLOCK_N + tl.arange(0, BLOCK_N)
    term = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the end are read from the start again and not written.
    at_x = x + (row % m).to(tl.int64)[:, None] * x_m + term[None, :]
    at_w = weight + (column % n).to(tl.int64)[None, :] * w_n + term[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, k, BLOCK_K):
        if WHOLE:
            a, b = tl.load(at_x), tl.load(at_w)
        else:
            a = tl.load(at_x, mask=term[None, :] < k - start, other=0)
            b = tl.load(at_w, mask=term[:, None] < k - start, other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        at_x += BLOCK_K
        at_w += BLOCK_K
    v = total.to(tl.float32) * tl.load(x_scale + row, mask=row < m, other=0.0)[:, None]
    v = v * tl.load(weight_scale + column, mask=column < n, other=0.0)[None, :]
    if bias is not None:
        v += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    at_out = out + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(at_out, v.to(out.dtype.element_ty), mask=(row < m)[:, None] & (column < n)[None, :])


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `naive.quantize_rows` for rows of at most `ops.MAX_CHANNELS` numbers; row strides need no copy."""
    return triton_rows.quantize_rows(x, torch.int8)


def rows_matmul(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute `naive.rows_matmul` for rows of at most `ops.MOST_TERMS` numbers."""
    rows, columns = as_rows(codes), as_rows(weight)
    (m, k), n = rows.shape, weight.shape[0]
    written = dtype if dtype in DTYPES else torch.float32
    out = torch.empty((*codes.shape[:-1], n), dtype=written, device=codes.device)
    tiles = tiles_for(m, k, codes.device)
    if bias is not None and bias.dtype not in DTYPES:
        bias = bias.float()
    with launching_on(codes):
        _product[(triton.cdiv(m, tiles.rows) * triton.cdiv(n, tiles.columns),)](
            rows, columns, scale.reshape(-1), weight_scale.reshape(-1), bias, out, m, n, k,
            rows.stride(0), columns.stride(0),
            BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.terms, TOGETHER=_TOGETHER,
            WHOLE=k % tiles.terms == 0, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out.to(dtype)


def tiles_for(rows: int, terms: int, device: torch.device) -> Tiles:
    """Return the tiles for a number of rows and of terms of a sum on a device."""
    if rows <= FEW.rows:
        return FEW
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    # With masks for the last terms, the registers of a thread do not suffice for the large tiles.
    return LARGE if hopper and terms % LARGE.terms == 0 else USUAL
