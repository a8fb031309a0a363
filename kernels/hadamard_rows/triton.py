"""Rotation and row-wise quantisation in one pass: a program rotates a row by matrix products and quantises it.

A row of K = 128 G channels is a matrix (G, 128). Blocks of up to 128 channels multiply it from the right with a matrix
of blocks H_h. Larger blocks use H_h = H_(h / 128) (x) H_128, so a second matrix multiplies it from the left. The
entries -1, 0 and 1 are exact in every dtype, and the sums are in float32. float32 numbers are the sum of two bfloat16
numbers, up to 2^-17 of their size, and each of them is multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from postgen.kernels.dispatch import launching_on
from postgen.kernels.fp8 import SMALLEST_SCALE
from postgen.kernels.hadamard_rows.naive import hadamard
from postgen.kernels.triton_rows import MOST, as_rows, rounded, scale_of

MAX_CHANNELS = 32768
"""The longest row that one program can hold in registers, with blocks of up to 128 channels; half of it otherwise."""
WIDTH = 128
"""Channels of the right matrix."""
_LEAST = 16
"""The smallest side of a matrix that the tensor cores multiply."""
_AHEAD = 128
"""Rows of up to this many groups of 16-bit numbers are loaded while the row before is processed."""
_ROWS = 8
"""Rows that one program processes in a loop, so that it loads the matrices once."""


@triton.jit
def _in_two(v, like):
    """Split float32 numbers into two parts in the dtype of another tensor."""
    high = v.to(like.dtype)
    return high, (v - high.to(tl.float32)).to(like.dtype)


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
            v = v * sign
        if v.dtype == tl.float32:
            high, low = _in_two(v, turn)
            v = tl.dot(low, turn, tl.dot(high, turn))
        else:
            v = tl.dot(v, turn)
        if left is not None:
            high, low = _in_two(v, mix)
            v = tl.dot(mix, low, tl.dot(mix, high))
        v = v * factor
        found = scale_of(v, None, LARGEST, SMALLEST)
        w = rounded(v, found, INTEGER)
        tl.store(codes + at * columns + column, w.to(codes.dtype.element_ty), mask=inside)
        tl.store(scale + at, found)


def rotate_quantize(x: Tensor, block: int, signs: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute `naive.rotate_quantize` for rows that `why_not` allows; row strides need no copy."""
    rows, columns = as_rows(x), x.shape[-1]
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    groups, ahead = groups_of(columns), loads_ahead(columns, block, x.element_size())
    # The interpreter cannot multiply bfloat16.
    part = torch.float32 if triton.knobs.runtime.interpret else torch.bfloat16
    right = _blocks(WIDTH, min(block, WIDTH), x.device, part if x.dtype == torch.float32 else x.dtype)
    left = _blocks(groups, block // WIDTH, x.device, part) if block > WIDTH else None
    with launching_on(x):
        _rotate[(triton.cdiv(rows.shape[0], _ROWS),)](
            rows, None if signs is None else signs.to(x.dtype), right, left, codes, scale,
            rows.shape[0], columns, rows.stride(0), block**-0.5,
            LARGEST=MOST[dtype], SMALLEST=SMALLEST_SCALE, INTEGER=dtype == torch.int8,
            GROUPS=groups, WIDTH=WIDTH, ROWS=_ROWS, num_warps=warps(groups), num_stages=2 if ahead else 1,
        )  # fmt: skip
    return codes, scale


def why_not(x: Tensor, block: int) -> str | None:
    """Return why the kernel cannot rotate the rows of a tensor on its device, or None if it can."""
    columns = x.shape[-1]
    most = MAX_CHANNELS // 2 if block > WIDTH else MAX_CHANNELS
    if columns > most:
        return f"rows have {columns} numbers, at most {most} fit with blocks of {block}"
    needed = shared_bytes(columns, block, x.element_size())
    if not x.is_cuda:
        return None
    properties: Any = torch.cuda.get_device_properties(x.device)
    there = properties.shared_memory_per_block_optin
    return f"it needs {needed} bytes of shared memory, the GPU has {there}" if needed > there else None


def groups_of(columns: int) -> int:
    """Return the rows of the matrix that a row of channels becomes: a power of two that tensor cores multiply."""
    return max(_LEAST, int(triton.next_power_of_2(triton.cdiv(columns, WIDTH))))


def warps(groups: int) -> int:
    """Return the number of warps of a program."""
    return min(16, max(4, groups // 8))


def loads_ahead(columns: int, block: int, size: int) -> bool:
    """Return whether the next row is loaded early; `size` is the bytes of a number."""
    return size == 2 and block <= WIDTH and groups_of(columns) <= _AHEAD


def shared_bytes(columns: int, block: int, size: int) -> int:
    """Return the shared memory of a program in bytes, as Triton 3.6 allocates it for Hopper: at least what it needs.

    It holds both matrices and up to three copies of a row, in 16 bits.
    """
    groups = groups_of(columns)
    copies = 2.5 if loads_ahead(columns, block, size) else 2 if block <= WIDTH else 3
    return 2 * WIDTH * WIDTH + int(2 * copies * groups * WIDTH) + (2 * groups * groups if block > WIDTH else 0)


_MATRICES: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}


def _blocks(size: int, block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the matrix (size, size) with Hadamard blocks on its diagonal, kept on the device."""
    # Kept, because making it takes longer than using it. Only kernels read it, so inference mode does not matter.
    key = (size, block, device, dtype)
    if key not in _MATRICES:
        matrix: Tensor = torch.block_diag(*[hadamard(block, device)] * (size // block))
        _MATRICES[key] = matrix.to(dtype)
    return _MATRICES[key]
