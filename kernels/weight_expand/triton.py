"""Expansion of packed weights in one pass: codes and scales are read once, and the numbers are written once.

A program expands pieces of rows. The length of a piece is the largest power of two, up to 256, that divides a group,
so a piece has one scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from postgen.kernels.dispatch import DTYPES, launching_on
from postgen.kernels.triton_rows import MOST, divided, whole
from postgen.kernels.weight_expand.naive import BLOCK_ROWS

_LONGEST = 256
"""The most channels of a piece."""
_NUMBERS = 2048
"""Numbers that one program of four warps expands: 16 a thread."""


@triton.jit
def _expand(
    codes, scale, zero, table, row_scale, out, pieces, channels, group, groups, share, row_bytes, plane_bytes,
    BITS: tl.constexpr, PLANES: tl.constexpr, SIGNED: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
    PIECE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Expand COUNT pieces of PIECE channels; PLANES is 0 for codes."""
    piece = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    there = piece < pieces
    in_row = channels // PIECE
    row, start = piece // in_row, (piece % in_row * PIECE).to(tl.int32)
    channel = start[:, None] + tl.arange(0, PIECE)[None, :]
    inside = there[:, None] & (channel >= 0)
    place = row // share * groups + start // group
    if PLANES > 0:
        of_group = scale + place * (PLANES + 1)
        values = tl.load(of_group, mask=there, other=0.0).to(tl.float32)[:, None] + tl.zeros(
            (COUNT, PIECE), tl.float32
        )
        for plane in tl.static_range(PLANES):
            more = tl.load(of_group + plane + 1, mask=there, other=0.0).to(tl.float32)[:, None]
            byte = tl.load(codes + plane * plane_bytes + row[:, None] * row_bytes + channel // 8, mask=inside, other=0)
            bit = (byte.to(tl.int32) >> (channel % 8)) & 1
            values += tl.where(bit > 0, more, 0.0)
    else:
        bit = channel * BITS
        at = codes + row[:, None] * row_bytes + bit // 8
        code = tl.load(at, mask=inside, other=0).to(tl.int32)
        if 8 % BITS != 0:
            # A code may lie in two bytes.
            more = inside & (bit // 8 + 1 < row_bytes)
            code |= tl.load(at + 1, mask=more, other=0).to(tl.int32) << 8
        code = (code >> (bit % 8)) & ((1 << BITS) - 1)
        if table is not None:
            values = tl.load(table + code)
        elif SIGNED:
            values = tl.where(code >= (1 << (BITS - 1)), code - (1 << BITS), code).to(tl.float32)
        else:
            values = code.to(tl.float32)
        if zero is not None:
            values -= tl.load(zero + place, mask=there, other=0.0).to(tl.float32)[:, None]
        values = values * tl.load(scale + place, mask=there, other=0.0)[:, None]
    if row_scale is not None:
        values = divided(values, tl.load(row_scale + row, mask=there, other=1.0)[:, None])
        values = tl.clamp(values, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        if INTEGER:
            values = whole(values)
    tl.store(out + row[:, None] * channels + channel, values.to(out.dtype.element_ty), mask=inside)


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
    """Compute `naive.expand`."""
    codes = codes.contiguous().view(torch.uint8)
    zero = None if zero is None else zero.contiguous()
    return _launch(codes, scale.contiguous(), zero, table, row_scale, channels, dtype, bits=bits, signed=signed)


def expand_planes(
    planes: Tensor, coefficients: Tensor, row_scale: Tensor | None, channels: int, dtype: torch.dtype
) -> Tensor:
    """Compute `naive.expand_planes`."""
    planes, coefficients = planes.contiguous(), coefficients.contiguous()
    return _launch(planes, coefficients, None, None, row_scale, channels, dtype, planes=planes.shape[0])


def _launch(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    row_scale: Tensor | None,
    channels: int,
    dtype: torch.dtype,
    *,
    bits: int = 1,
    planes: int = 0,
    signed: bool = False,
) -> Tensor:
    rows, row_bytes = codes.shape[-2:]
    groups = scale.shape[1]
    group = channels // groups
    piece = min(_LONGEST, group & -group)
    count = _NUMBERS // piece
    written = dtype if row_scale is not None or dtype in DTYPES else torch.float32
    out = torch.empty(rows, channels, dtype=written, device=codes.device)
    share = 1 if scale.shape[0] == rows else rows if scale.shape[0] == 1 else BLOCK_ROWS
    pieces = out.numel() // piece
    with launching_on(codes):
        _expand[(triton.cdiv(pieces, count),)](
            codes, scale, zero, table, row_scale, out, pieces, channels, group, groups, share, row_bytes,
            rows * row_bytes, BITS=bits, PLANES=planes, SIGNED=signed, LARGEST=MOST.get(dtype, 0.0),
            INTEGER=dtype == torch.int8, PIECE=piece, COUNT=count, num_warps=4,
        )  # fmt: skip
    return out.to(dtype)
