"""Rotation and row-wise quantisation in one pass: a program rotates a row by matrix products and quantises it.

A row of K = 128 G channels is a matrix (G, 128). Blocks of up to 128 channels multiply it from the right with a matrix
of blocks H_h. Larger blocks use H_h = H_(h / 128) (x) H_128, so a second matrix multiplies it from the left. The
entries -1, 0 and 1 are exact in every dtype, and the sums are in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from postgen.kernels.dispatch import launching_on
from postgen.kernels.fp8 import SMALLEST_SCALE
from postgen.kernels.hadamard_rows.naive import hadamard
from postgen.kernels.triton_rows import MOST, as_rows, rounded, scale_of

WIDTH = 128
"""Channels of the right matrix."""
_LEAST = 16
"""The smallest side of a matrix that the tensor cores multiply."""
_ROWS = 8
"""Rows that one program processes in a loop, so that it loads the matrices once."""


@triton.jit
def _rotate(
    x, signs, right, left, codes, scale, rows, columns, stride, factor,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, INTEGER: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rotate rows, find their scales and write their codes."""
    group, channel = tl.arange(0, GROUPS), tl.arange(0, WIDTH)
    column = group[:, None] * WIDTH + channel[None, :]
    inside = column < columns
    turn = tl.load(right + channel[:, None] * WIDTH + channel[None, :])
    if left is not None:
        mix = tl.load(left + group[:, None] * GROUPS + group[None, :])
    if signs is not None:
        sign = tl.load(signs + column, mask=inside, other=0.0)
    first = tl.program_id(0) * ROWS
    for step in range(0, tl.minimum(ROWS, rows - first)):
        at = first.to(tl.int64) + step
        v = tl.load(x + at * stride + column, mask=inside, other=0.0)
        if signs is not None:
            v = (v * sign).to(turn.dtype)
        v = tl.dot(v, turn, input_precision="tf32x3")
        if left is not None:
            v = tl.dot(mix, v, input_precision="tf32x3")
        v = v * factor
        found = scale_of(v, None, LARGEST, SMALLEST)
        w = rounded(v, found, LARGEST, INTEGER)
        tl.store(codes + at * columns + column, w.to(codes.dtype.element_ty), mask=inside)
        tl.store(scale + at, found)


def rotate_quantize(x: Tensor, block: int, signs: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute `naive.rotate_quantize` for rows that `why_not` allows; row strides need no copy."""
    rows, columns = as_rows(x), x.shape[-1]
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    groups = max(_LEAST, triton.next_power_of_2(triton.cdiv(columns, WIDTH)))
    right = _blocks(WIDTH, min(block, WIDTH), x.device, x.dtype)
    left = _blocks(groups, block // WIDTH, x.device, torch.float32) if block > WIDTH else None
    with launching_on(x):
        _rotate[(triton.cdiv(rows.shape[0], _ROWS),)](
            rows, None if signs is None else signs.to(x.dtype), right, left, codes, scale,
            rows.shape[0], columns, rows.stride(0), block**-0.5,
            LARGEST=MOST[dtype], SMALLEST=SMALLEST_SCALE, INTEGER=dtype == torch.int8,
            GROUPS=groups, WIDTH=WIDTH, ROWS=_ROWS, num_warps=min(16, max(4, groups // 8)),
        )  # fmt: skip
    return codes, scale


_MATRICES: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}


def _blocks(size: int, block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the matrix (size, size) with Hadamard blocks on its diagonal, kept on the device."""
    # A copy from the CPU waits and cannot be recorded in a CUDA graph.
    key = (size, block, device, dtype)
    if key not in _MATRICES:
        matrix: Tensor = torch.block_diag(*[hadamard(block)] * (size // block))
        _MATRICES[key] = matrix.to(device, dtype)
    return _MATRICES[key]
