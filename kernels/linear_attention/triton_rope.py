"""The rotary table in the format of the linear attention kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from postgen.kernels.linear_attention.naive import Terms


@triton.jit
def spread_rope(
    rope, table,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, END_T: tl.constexpr, END_H: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write one row of the table: of a line of tokens, of a column, or one of the two rows for text."""
    place = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    lines = FRAMES * ROWS
    of_lines = place <= lines
    text = (place == lines) | (place == lines + 1 + COLUMNS)
    column = tl.minimum(tl.maximum(place - lines - 1, 0), COLUMNS - 1)
    line = tl.minimum(place, lines - 1)
    position = tl.where(d < END_T, line // ROWS, FRAMES + line % ROWS)
    position = tl.where(of_lines, position, FRAMES + ROWS + column)
    mine = (d < CHANNELS) & tl.where(of_lines, d < END_H, d >= END_H)
    angle = tl.load(rope + position * CHANNELS + d, mask=mine & (text == 0), other=0.0)
    # Text is not rotated: every cosine is 1.
    angle = tl.where(mine & text & (d % 2 == 0), 1.0, angle)
    tl.store(table + place * BLOCK_D + d, angle.to(table.dtype.element_ty))


def rope_rows(terms: Terms, x: Tensor, width: int) -> Tensor | None:
    """Return `Terms.rope` as a table (T * h + 1 + w + 1, width): one row per line of tokens, then one row per column.

    A line is one row of one frame. Each row of the table alternates cosines and sines, with 0 for channels that the
    other axis rotates. After the lines and after the columns follows one row for text, which is not rotated. The table
    is float16 if x is bfloat16: products of bfloat16 round more coarsely anyway.
    """
    if terms.rope is None:
        return None
    assert terms.grid is not None
    assert terms.rope_pairs is not None
    frames, rows, columns = terms.grid
    dtype = torch.float16 if x.dtype == torch.bfloat16 else torch.float32
    table = torch.empty(frames * rows + columns + 2, width, dtype=dtype, device=x.device)
    spread_rope[(len(table),)](
        terms.rope.contiguous(),
        table,
        FRAMES=frames,
        ROWS=rows,
        END_T=2 * terms.rope_pairs[0],
        END_H=2 * (terms.rope_pairs[0] + terms.rope_pairs[1]),
        COLUMNS=columns,
        CHANNELS=x.shape[-1],
        BLOCK_D=width,
        num_warps=1,
    )
    return table
