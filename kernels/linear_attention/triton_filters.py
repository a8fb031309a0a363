"""The gradient of the convolution weights: a kernel that goes down the rows of frames, strip by strip.

The strips are those of `triton_convolution.py`. A program loads each row of the values once. It keeps the SPACE rows
of gradients to which this row contributes, STRIP columns each, and sums the products per tap in registers. Every
program writes its sums, and the sums of all programs are added in a fixed order.
"""

# Triton adds tuples, but does not unpack them.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from postgen.kernels.linear_attention.triton_convolution import exists, look, strips_of
from postgen.kernels.linear_attention.triton_tiles import share_of


@triton.jit(do_not_specialize=["blocks", "bands", "band"])
def sum_filters(
    gradient, x, lengths, filters,
    gradient_b, gradient_n, gradient_h, gradient_d, x_b, x_h, x_frame, blocks, bands, band,
    SPACE: tl.constexpr, TIME: tl.constexpr, HEADS: tl.constexpr, STRIP: tl.constexpr, X_N: tl.constexpr,
    X_D: tl.constexpr, BLOCK_E: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the sums of one band of a block of strips, (B, blocks * bands, taps, H, D), with the taps of space first.

    Without a convolution in space, SPACE is 1, and its only tap is the centre of the convolution along time.
    """
    sample, head, part, block, top, bottom = share_of(
        tl.program_id(0), blocks, 0, bands, band, HEADS, BLOCK_D // BLOCK_E, ROWS
    )
    STRIPS: tl.constexpr = BLOCK_N // STRIP
    GROUPS: tl.constexpr = (COLUMNS + STRIP - 1) // STRIP
    REACH: tl.constexpr = SPACE // 2
    TAPS: tl.constexpr = SPACE * SPACE + TIME
    e = part * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    length = FRAMES * ROWS * COLUMNS
    if lengths is not None:
        length = tl.minimum(length, tl.load(lengths + sample).to(tl.int32))
    real, frame, column, token = strips_of(block, STRIP, STRIPS, GROUPS, FRAMES, ROWS, COLUMNS)
    x += sample * x_b + head.to(tl.int64) * x_h + token.to(tl.int64) * X_N + e * X_D
    gradient += sample * gradient_b + head.to(tl.int64) * gradient_h
    gradient += token.to(tl.int64) * gradient_n + e.to(tl.int64) * gradient_d

    sums = ()
    for _ in tl.static_range(0, TAPS):
        sums = sums + (tl.zeros((STRIPS, BLOCK_E), dtype=tl.float32),)
    first, last = tl.maximum(top - REACH, 0), tl.minimum(bottom + REACH, ROWS)
    window = ()
    for m in tl.static_range(0, SPACE):
        window = window + of_row(
            gradient, first - REACH + m, top, bottom, real, column, e, gradient_n, STRIP, COLUMNS, CHANNELS
        )
    seen = look(
        x, frame, column, e, first, token, length, lengths, x_frame,
        1, SPACE, TIME, STRIP, X_N, FRAMES, ROWS, COLUMNS, CHANNELS,
    )  # fmt: skip
    for step in tl.range(0, last - first, num_stages=1):
        line = first + step
        # Load the next row while this one is multiplied.
        below = of_row(gradient, line + REACH + 1, top, bottom, real, column, e, gradient_n, STRIP, COLUMNS, CHANNELS)
        ahead = look(
            x, frame, column, e, tl.minimum(line + 1, last - 1), token, length, lengths, x_frame,
            1, SPACE, TIME, STRIP, X_N, FRAMES, ROWS, COLUMNS, CHANNELS,
        )  # fmt: skip
        sums = with_row(sums, window, seen, SPACE, TIME, STRIP)
        window = shifted(window, below, SPACE, STRIP)
        seen = ahead

    filters += (((sample * blocks + block) * bands + top // band) * TAPS * HEADS + head) * CHANNELS + e
    put_taps(filters, frame, e, sums, SPACE, TIME, HEADS, FRAMES, CHANNELS)


@triton.jit
def of_row(
    gradient, line, top, bottom, real, column, e, gradient_n,
    STRIP: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Load one row of gradients as a tuple of columns; 0 outside the band."""
    inside = real & (e < CHANNELS) & (line >= top) & (line < bottom)
    here = gradient + line.to(tl.int64) * COLUMNS * gradient_n
    row = ()
    for c in tl.static_range(0, STRIP):
        there = inside
        if COLUMNS % STRIP > 0:
            there = there & (column + c < COLUMNS)
        row = row + (tl.load(here + tl.cast(c, tl.int64) * gradient_n, mask=there, other=0.0),)
    return row


@triton.jit
def shifted(window, below, SPACE: tl.constexpr, STRIP: tl.constexpr):
    """Move the window down by one row: drop the topmost row and append `below`."""
    moved = ()
    for i in tl.static_range(STRIP, SPACE * STRIP):
        moved = moved + (window[i],)
    return moved + below


@triton.jit
def with_row(sums, window, seen, SPACE: tl.constexpr, TIME: tl.constexpr, STRIP: tl.constexpr):
    """Add the products of one row of values to the sums.

    Through row i of the filter, this row of values contributes to row SPACE - 1 - i of the window of gradients.
    """
    REACH: tl.constexpr = SPACE // 2
    wide = ()
    for j in tl.static_range(0, STRIP + SPACE - 1):
        wide = wide + (seen[j].to(tl.float32),)
    added = ()
    for i in tl.static_range(0, SPACE):
        for j in tl.static_range(0, SPACE):
            total = sums[i * SPACE + j]
            for c in tl.static_range(0, STRIP):
                total += window[(SPACE - 1 - i) * STRIP + c].to(tl.float32) * wide[c + j]
            added = added + (total,)
    for tap in tl.static_range(0, TIME):
        total = sums[SPACE * SPACE + tap]
        if tap != TIME // 2:
            for c in tl.static_range(0, STRIP):
                # In the result of `look`, the columns of other frames follow the columns of the row itself.
                value = seen[STRIP + SPACE - 1 + (tap - (tap > TIME // 2)) * STRIP + c]
                total += window[REACH * STRIP + c].to(tl.float32) * value.to(tl.float32)
        added = added + (total,)
    return added


@triton.jit
def put_taps(
    filters, frame, e, sums,
    SPACE: tl.constexpr, TIME: tl.constexpr, HEADS: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum over the strips and write the result of each tap."""
    for tap in tl.static_range(0, SPACE * SPACE + TIME):
        total = sums[tap]
        if tap >= SPACE * SPACE:
            if tap - SPACE * SPACE == TIME // 2:
                total = sums[SPACE * SPACE // 2]
            else:
                # Drop frames outside the clip, for which `look` loaded the strip's own frame.
                total = tl.where(exists(frame, tap - SPACE * SPACE, 1, TIME, FRAMES), total, 0.0)
        tl.store(filters + tap * HEADS * CHANNELS, tl.sum(total, axis=0)[None, :], mask=e < CHANNELS)
