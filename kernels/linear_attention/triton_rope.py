"""The rotary table as the kernels of linear attention read it."""

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
    """Write one row: of a line of tokens, of what has no line, of a column, or of what has no column."""
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
    # Text is not turned: every cosine is 1.
    angle = tl.where(mine & text & (d % 2 == 0), 1.0, angle)
    tl.store(table + place * BLOCK_D + d, angle.to(table.dtype.element_ty))


def rope_rows(terms: Terms, x: Tensor, width: int) -> Tensor | None:
    """Return `Terms.rope` as (T * h + 1 + w + 1, width): a row for each line of tokens and one for each column.

    A row has cosines and sines in turns, and 0 where channels turn with another axis. The last row of either kind is
    of text, which is not turned. It is float16 where x is bfloat16, and products are rounded more coarsely.
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
