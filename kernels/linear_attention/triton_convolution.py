"""The depth-wise convolutions of linear attention: a kernel that walks down the rows of frames.

Tokens are cut into strips, STRIP columns of one frame. A program takes some strips of one head and goes through their
rows. Each row is loaded once, STRIP columns and those that the filter sees beside them, and added to the SPACE rows of
results that it is a part of, which wait in registers; the highest of them is then complete. The queries of that row
meet the state in the same step, so that results are written once.

A tensor here is one column of all strips, (strips, channels), and a row is a tuple of such tensors: a neighbour is
another element of the tuple, and no thread has to ask another one for it.
"""

# Triton adds tuples, but does not unpack them.
# ruff: noqa: RUF005, SIM108
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from postgen.kernels.linear_attention.triton_tiles import (
    angles,
    fetch,
    fetch_vector,
    question,
    share_of,
    state_times,
    terms_of,
)


@triton.jit(do_not_specialize=["blocks", "whole", "bands", "band"])
def convolve_rows(
    x, query, rstd, weight, table, lengths, space, time, terms, key_sums, out,
    x_b, x_h, x_frame, query_b, query_n, query_h, query_d, out_b, weight_h, taps_h, blocks, whole, bands, band,
    norm_eps, eps,
    SIGN: tl.constexpr, SPACE: tl.constexpr, TIME: tl.constexpr, TAPS: tl.constexpr, HEADS: tl.constexpr,
    STRIP: tl.constexpr, X_N: tl.constexpr, X_D: tl.constexpr, BLOCK_E: tl.constexpr, STACKED: tl.constexpr,
    RELU: tl.constexpr, NORM: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the sum of both convolutions of x and, if there are queries, of their attention.

    A block is BLOCK_E channels of BLOCK_N // STRIP strips, and a head has `blocks` of each part of its channels. The
    first `whole` programs take a block, of the others `bands` share one. SIGN -1 transposes the convolutions. Their
    weights lie tap by tap, TAPS numbers apart; without `space`, SPACE is 1.
    """
    sample, head, part, block, top, bottom = share_of(
        tl.program_id(0), blocks, whole, bands, band, HEADS, BLOCK_D // BLOCK_E, ROWS
    )
    e = part * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    tokens = FRAMES * ROWS * COLUMNS
    length = tokens
    STRIPS: tl.constexpr = BLOCK_N // STRIP
    GROUPS: tl.constexpr = (COLUMNS + STRIP - 1) // STRIP
    if lengths is not None:
        length = tl.minimum(tokens, tl.load(lengths + sample).to(tl.int32))

    real, frame, column, token = strips_of(block, STRIP, STRIPS, GROUPS, FRAMES, ROWS, COLUMNS)
    x += sample * x_b + head.to(tl.int64) * x_h + token.to(tl.int64) * X_N + e * X_D
    out += sample * out_b + head * CHANNELS + token.to(tl.int64) * (HEADS * CHANNELS) + e
    # A tile of weights, whose rows are the same, has the layout of the others.
    taps = head * taps_h + e + tl.zeros_like(token)
    if space is not None:
        space += taps
    if time is not None:
        time += taps
    high, low, key_sum, row = 0.0, 0.0, 0.0, tl.arange(0, BLOCK_N)
    if query is not None:
        which = sample * HEADS + head
        query += sample * query_b + head.to(tl.int64) * query_h
        if weight is not None:
            weight += head * weight_h
        if rstd is not None:
            rstd += sample * tokens
        high, low = terms_of(terms, which, part, BLOCK_E, STACKED, BLOCK_D, DOT)
        key_sum = fetch_vector(key_sums, which, CHANNELS, BLOCK_D)
        row = tokens_of_queries(block, row, STRIP, STRIPS, GROUPS, FRAMES, ROWS, COLUMNS)

    walk(
        x, query, rstd, weight, table, lengths, space, time, key_sum, high, low, out,
        frame, column, token, e, row, real, top, bottom, length, x_frame, query_n, query_d, norm_eps, eps,
        SIGN, SPACE, TIME, TAPS, HEADS, STRIP, X_N, BLOCK_E, RELU, NORM, FRAMES, ROWS, COLUMNS,
        CHANNELS, BLOCK_N, BLOCK_D, DOT, PRECISION,
    )  # fmt: skip


@triton.jit
def walk(
    x, query, rstd, weight, table, lengths, space, time, key_sum, high, low, out,
    frame, column, token, e, row, real, top, bottom, length, x_frame, query_n, query_d, norm_eps, eps,
    SIGN: tl.constexpr, SPACE: tl.constexpr, TIME: tl.constexpr, TAPS: tl.constexpr, HEADS: tl.constexpr,
    STRIP: tl.constexpr, X_N: tl.constexpr, BLOCK_E: tl.constexpr,
    RELU: tl.constexpr, NORM: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Go down the rows of a band: only read what lies above it, then write, then write what sees no more rows."""
    STRIPS: tl.constexpr = BLOCK_N // STRIP
    REACH: tl.constexpr = SPACE // 2
    none = blank(STRIPS, STRIP, BLOCK_E)
    last = tl.minimum(bottom + REACH, ROWS)
    sums, seen = approach(
        x, lengths, space, time, frame, column, token, e, top, last, length, x_frame,
        SIGN, SPACE, TIME, TAPS, STRIP, X_N, BLOCK_E, FRAMES, ROWS, COLUMNS, CHANNELS, STRIPS,
    )  # fmt: skip
    for step in range(0, last - top - REACH):
        line = top + REACH + step
        answer = attend(
            query, key_sum, high, low, rstd, weight, table, (line - REACH) * COLUMNS, row, query_n, query_d, norm_eps,
            eps, none, STRIP, BLOCK_E, RELU, NORM, FRAMES, ROWS, COLUMNS, CHANNELS, BLOCK_N, BLOCK_D, DOT, PRECISION,
        )  # fmt: skip
        middle = slide(
            sums, seen, frame, space, time, e, SIGN, SPACE, TIME, TAPS, STRIP, FRAMES, CHANNELS, REACH, REACH + 1
        )
        # A row ahead, and not before the product of matrices, whose fence waits for what is being loaded.
        ahead = look(
            x, frame, column, e, tl.minimum(line + 1, last - 1), token, length, lengths, x_frame,
            SIGN, SPACE, TIME, STRIP, X_N, FRAMES, ROWS, COLUMNS, CHANNELS,
        )  # fmt: skip
        upper = slide(sums, seen, frame, space, time, e, SIGN, SPACE, TIME, TAPS, STRIP, FRAMES, CHANNELS, 0, REACH)
        lower = slide(
            sums, seen, frame, space, time, e, SIGN, SPACE, TIME, TAPS, STRIP, FRAMES, CHANNELS, REACH + 1, SPACE
        )
        sums = upper + middle + lower
        put_columns(out, line - REACH, real, column, e, sums, answer, STRIP, HEADS, COLUMNS, CHANNELS)
        seen = ahead
    # No row of x is left that these see.
    last = tl.maximum(last, top + REACH)
    for step in range(0, bottom + REACH - last):
        line = last + step
        answer = attend(
            query, key_sum, high, low, rstd, weight, table, (line - REACH) * COLUMNS, row, query_n, query_d, norm_eps,
            eps, none, STRIP, BLOCK_E, RELU, NORM, FRAMES, ROWS, COLUMNS, CHANNELS, BLOCK_N, BLOCK_D, DOT, PRECISION,
        )  # fmt: skip
        sums = slide(sums, None, frame, space, time, e, SIGN, SPACE, TIME, TAPS, STRIP, FRAMES, CHANNELS, 0, SPACE)
        put_columns(out, line - REACH, real, column, e, sums, answer, STRIP, HEADS, COLUMNS, CHANNELS)


@triton.jit
def approach(
    x, lengths, space, time, frame, column, token, e, top, last, length, x_frame,
    SIGN: tl.constexpr, SPACE: tl.constexpr, TIME: tl.constexpr, TAPS: tl.constexpr, STRIP: tl.constexpr,
    X_N: tl.constexpr, BLOCK_E: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """Read the rows of x above the first that completes a sum of the band: return the sums and that row."""
    REACH: tl.constexpr = SPACE // 2
    sums = blank(STRIPS, SPACE * STRIP, BLOCK_E)
    first = tl.maximum(top - REACH, 0)
    above = tl.minimum(top + REACH, ROWS)
    seen = look(
        x, frame, column, e, first, token, length, lengths, x_frame,
        SIGN, SPACE, TIME, STRIP, X_N, FRAMES, ROWS, COLUMNS, CHANNELS,
    )  # fmt: skip
    for step in tl.range(0, above - first, num_stages=1):
        ahead = look(
            x, frame, column, e, tl.minimum(first + step + 1, last - 1), token, length, lengths, x_frame,
            SIGN, SPACE, TIME, STRIP, X_N, FRAMES, ROWS, COLUMNS, CHANNELS,
        )  # fmt: skip
        sums = slide(sums, seen, frame, space, time, e, SIGN, SPACE, TIME, TAPS, STRIP, FRAMES, CHANNELS, 0, SPACE)
        seen = ahead
    for _ in tl.range(0, top + REACH - above, num_stages=1):
        sums = slide(sums, None, frame, space, time, e, SIGN, SPACE, TIME, TAPS, STRIP, FRAMES, CHANNELS, 0, SPACE)
    return sums, seen


@triton.jit
def strips_of(
    block, STRIP: tl.constexpr, STRIPS: tl.constexpr, GROUPS: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return which strips of a block exist, their frames and first columns, and those columns' tokens in row 0."""
    strip = block * STRIPS + tl.arange(0, STRIPS)[:, None]
    real = strip < FRAMES * GROUPS
    strip = tl.minimum(strip, FRAMES * GROUPS - 1)
    # One frame after another: what a strip reads of the next frame, the next strip has just read.
    frame, column = strip % FRAMES, strip // FRAMES * STRIP
    return real, frame, column, frame * (ROWS * COLUMNS) + column


@triton.jit
def tokens_of_queries(
    block, row, STRIP: tl.constexpr, STRIPS: tl.constexpr, GROUPS: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return the tokens of a tile of queries in the first row: those of x, strip by strip."""
    strip = block * STRIPS + row // STRIP
    column = strip // FRAMES * STRIP + row % STRIP
    there = (strip < FRAMES * GROUPS) & (column < COLUMNS)
    return tl.where(there, strip % FRAMES * (ROWS * COLUMNS) + column, FRAMES * ROWS * COLUMNS)


@triton.jit
def blank(STRIPS: tl.constexpr, COUNT: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return so many columns of zeros."""
    columns = ()
    for _ in tl.static_range(0, COUNT):
        columns = columns + (tl.zeros((STRIPS, BLOCK_E), dtype=tl.float32),)
    return columns


@triton.jit
def attend(
    query, key_sum, high, low, rstd, weight, table, start, row, query_n, query_d, norm_eps, eps, none,
    STRIP: tl.constexpr, BLOCK_E: tl.constexpr, RELU: tl.constexpr, NORM: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the attention of one row's queries, column by column."""
    columns = none
    if query is not None:
        tokens = FRAMES * ROWS * COLUMNS
        q = fetch(query, start, row, query_n, query_d, tokens, CHANNELS, BLOCK_D)
        a = 0.0
        b = 0.0
        if table is not None:
            a, b = angles(table, 0, start, row, tokens, FRAMES, ROWS, COLUMNS, False, BLOCK_D, BLOCK_D)
        q, scale = question(
            q, key_sum, rstd, weight, table, a, b, start, row, tokens, norm_eps, eps,
            RELU, NORM, CHANNELS, BLOCK_N, BLOCK_D, DOT,
        )  # fmt: skip
        columns = apart(
            state_times(high, low, tl.trans(q), scale, BLOCK_E, PRECISION), STRIP, BLOCK_N // STRIP, BLOCK_E
        )
    return columns


@triton.jit
def look(
    x, frame, column, e, line, token, length, lengths, x_frame,
    SIGN: tl.constexpr, SPACE: tl.constexpr, TIME: tl.constexpr, STRIP: tl.constexpr, X_N: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return one row of x: the columns that the filter sees, then those of other frames, tap by tap."""
    here = x + line.to(tl.int64) * (COLUMNS * X_N)
    # How many columns and tokens there are to the right of the first column of a strip.
    beyond = COLUMNS - column
    left = length - token - line * COLUMNS
    seen = ()
    for j in tl.static_range(0, STRIP + SPACE - 1):
        seen = seen + (
            beside(here, column, beyond, left, e, lengths, j - SPACE // 2, STRIP, X_N, COLUMNS, CHANNELS),
        )  # fmt: skip
    for tap in tl.static_range(0, TIME):
        if tap != TIME // 2:
            # Instead of a frame that does not exist, the same one: its weight is 0.
            other = tl.where(exists(frame, tap, SIGN, TIME, FRAMES), SIGN * (tap - TIME // 2), 0)
            there = here + other.to(tl.int64) * x_frame
            for c in tl.static_range(0, STRIP):
                seen = seen + (
                    beside(
                        there, column, beyond, left - other * (ROWS * COLUMNS), e, lengths, c, STRIP, X_N, COLUMNS,
                        CHANNELS,
                    ),
                )  # fmt: skip
    return seen


@triton.jit
def exists(frame, tap: tl.constexpr, SIGN: tl.constexpr, TIME: tl.constexpr, FRAMES: tl.constexpr):
    """Say for which strips there is the frame that a tap of the convolution in time looks at."""
    other = frame + SIGN * (tap - TIME // 2)
    return (other >= 0) & (other < FRAMES)


@triton.jit
def beside(
    here, column, beyond, left, e, lengths,
    dw: tl.constexpr, STRIP: tl.constexpr, X_N: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return what lies dw columns beside the first column of every strip; 0 outside the row and beyond the length."""
    inside = e < CHANNELS
    # Only what may be otherwise is compared: it would be for every row and column.
    if dw < 0:
        inside = inside & (column >= -dw)
    if dw >= STRIP or COLUMNS % STRIP > 0:
        inside = inside & (dw < beyond)
    if lengths is not None:
        inside = inside & (dw < left)
    return tl.load(here + dw * X_N, mask=inside, other=0.0)


@triton.jit
def slide(
    sums, seen, frame, space, time, e, SIGN: tl.constexpr, SPACE: tl.constexpr, TIME: tl.constexpr,
    TAPS: tl.constexpr, STRIP: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
    FROM: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Go down by one row, to the one that was seen: return the sums of some of the rows that see it, from above."""
    REACH: tl.constexpr = SPACE // 2
    wide = ()
    if seen is not None:
        for j in tl.static_range(0, STRIP + SPACE - 1):
            wide = wide + (seen[j].to(tl.float32),)
    moved = ()
    for m in tl.static_range(FROM, TO):
        row = ()
        for c in tl.static_range(0, STRIP):
            if m + 1 < SPACE:
                start = sums[(m + 1) * STRIP + c]
            else:
                start = tl.zeros_like(sums[c])
            row = row + (start,)
        if seen is not None:
            # The row that is seen lies REACH - m rows below these sums.
            for j in tl.static_range(0, SPACE):
                w = tap_of(
                    space, time, e, (REACH + SIGN * (REACH - m)) * SPACE + REACH + SIGN * (j - REACH),
                    SPACE, TIME, TAPS, CHANNELS,
                )  # fmt: skip
                row = weighted(row, wide, w, j, STRIP)
            if m == REACH:
                for i in tl.static_range(0, TIME - 1):
                    w = tl.load(time + (i + (i >= TIME // 2)) * TAPS, mask=e < CHANNELS, other=0.0)
                    w = tl.where(exists(frame, i + (i >= TIME // 2), SIGN, TIME, FRAMES), w, 0.0)
                    row = weighted(row, seen, w, STRIP + SPACE - 1 + i * STRIP, STRIP)
        moved = moved + row
    return moved


@triton.jit
def weighted(row, values, w, FIRST: tl.constexpr, STRIP: tl.constexpr):
    """Add one tap to a row."""
    added = ()
    for c in tl.static_range(0, STRIP):
        added = added + (row[c] + values[FIRST + c].to(tl.float32) * w,)
    return added


@triton.jit
def tap_of(
    space, time, e, tap: tl.constexpr, SPACE: tl.constexpr, TIME: tl.constexpr, TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return the weights of one tap of a row; both convolutions have one at the centre."""
    if space is None:
        w = tl.load(time + TIME // 2 * TAPS, mask=e < CHANNELS, other=0.0)
    else:
        w = tl.load(space + tap * TAPS, mask=e < CHANNELS, other=0.0)
        if time is not None and tap == SPACE * SPACE // 2:
            w += tl.load(time + TIME // 2 * TAPS, mask=e < CHANNELS, other=0.0)
    return w


@triton.jit
def put_columns(
    out, line, real, column, e, columns, answer, STRIP: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the highest row of sums."""
    here = out + line.to(tl.int64) * (COLUMNS * HEADS * CHANNELS)
    for c in tl.static_range(0, STRIP):
        inside = real & (e < CHANNELS)
        if COLUMNS % STRIP > 0:
            inside = inside & (column + c < COLUMNS)
        tl.store(here + c * HEADS * CHANNELS, (columns[c] + answer[c]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def apart(tile, STRIP: tl.constexpr, STRIPS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the columns of all strips, given the transpose of the tile of their tokens, strip by strip."""
    tl.static_assert(STRIP <= 16)
    columns = (tl.permute(tl.reshape(tile, (BLOCK_E, STRIPS, STRIP)), (1, 0, 2)),)
    if STRIP > 1:
        columns = halves(columns, STRIP // 2, STRIPS, BLOCK_E)
    if STRIP > 2:
        columns = halves(columns, STRIP // 4, STRIPS, BLOCK_E)
    if STRIP > 4:
        columns = halves(columns, STRIP // 8, STRIPS, BLOCK_E)
    if STRIP > 8:
        columns = halves(columns, STRIP // 16, STRIPS, BLOCK_E)
    flat = ()
    for c in tl.static_range(0, STRIP):
        flat = flat + (tl.reshape(columns[c], (STRIPS, BLOCK_E)),)
    return flat


@triton.jit
def halves(tensors, HALF: tl.constexpr, STRIPS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Cut tensors of 2 * HALF columns into those of the even and then those of the odd ones."""
    even = ()
    odd = ()
    for i in tl.static_range(0, len(tensors)):
        a, b = tl.split(tl.reshape(tensors[i], (STRIPS, BLOCK_E, HALF, 2)))
        even = even + (a,)
        odd = odd + (b,)
    return even + odd
