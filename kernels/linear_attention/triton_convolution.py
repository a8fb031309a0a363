"""The depth-wise convolutions of linear attention: a kernel that goes down the rows of frames.

Tokens are divided into strips; a strip is STRIP neighbouring columns of one frame. A program processes some strips of
one head, row by row. It loads each row once: the STRIP columns and the neighbours within reach of the filter. It adds
the row to the SPACE rows of results to which the row contributes. These partial sums stay in registers, and the
topmost one is then complete. In the same step the queries of this row are multiplied with the state, so that every
result is written only once.

A tensor here holds one column of all strips, (strips, channels), and a row is a tuple of such tensors. A neighbouring
column is another element of the tuple, so threads need not exchange data.
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
    """Write the sum of both convolutions of x, plus the attention of the queries if there are queries.

    A block holds BLOCK_E channels of BLOCK_N // STRIP strips. A head has `blocks` blocks for each part of its
    channels. Each of the first `whole` programs processes one block. For the other blocks, `bands` programs share a
    block, and each processes a band of its rows. SIGN -1 transposes the convolutions. The weights are stored tap by
    tap, with a stride of TAPS numbers. Without `space`, SPACE is 1.
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
    # The weights are the same for all strips. Adding zeros of the strips' shape gives them the layout of other tiles.
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
    """Go down the rows of a band: first only read (`approach`), then read and write, then write the last rows."""
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
        # Load the next row here, and not before the matrix product, whose fence would wait for the loads.
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
    # The last rows of results: all rows of x within their reach are already added.
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
    """Prepare the sums for the first row of results of a band.

    The first result, row `top`, is complete once row `top` + REACH of x is added. This function adds the rows of x
    before that one, and returns the partial sums and the loaded row `top` + REACH, which `walk` adds next. Below the
    last row of x there is nothing to add: the sums only move on, and the returned row is not used.
    """
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
    """Return for the strips of a block: whether each exists, its frame, its first column, and this column's token in
    row 0."""
    strip = block * STRIPS + tl.arange(0, STRIPS)[:, None]
    real = strip < FRAMES * GROUPS
    strip = tl.minimum(strip, FRAMES * GROUPS - 1)
    # Neighbouring strips are from neighbouring frames: the rows that a strip reads from the next frame are those that
    # the next strip reads too, so they are in the cache.
    frame, column = strip % FRAMES, strip // FRAMES * STRIP
    return real, frame, column, frame * (ROWS * COLUMNS) + column


@triton.jit
def tokens_of_queries(
    block, row, STRIP: tl.constexpr, STRIPS: tl.constexpr, GROUPS: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return the token indices of a tile of queries in the first row, in the order of the strips of x."""
    strip = block * STRIPS + row // STRIP
    column = strip // FRAMES * STRIP + row % STRIP
    there = (strip < FRAMES * GROUPS) & (column < COLUMNS)
    return tl.where(there, strip % FRAMES * (ROWS * COLUMNS) + column, FRAMES * ROWS * COLUMNS)


@triton.jit
def blank(STRIPS: tl.constexpr, COUNT: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return a row of COUNT columns of zeros."""
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
    """Return the attention of the queries of one row as a tuple of columns; `none` without queries."""
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
    """Load one row of x: the columns within reach of the filter, then the columns of other frames, tap by tap."""
    here = x + line.to(tl.int64) * (COLUMNS * X_N)
    # Numbers of columns and of tokens from the first column of a strip on.
    beyond = COLUMNS - column
    left = length - token - line * COLUMNS
    seen = ()
    for j in tl.static_range(0, STRIP + SPACE - 1):
        seen = seen + (
            beside(here, column, beyond, left, e, lengths, j - SPACE // 2, STRIP, X_N, COLUMNS, CHANNELS),
        )  # fmt: skip
    for tap in tl.static_range(0, TIME):
        if tap != TIME // 2:
            # Frames outside the clip are replaced by the strip's own frame; their weight is 0.
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
    """Return for which strips the frame of a tap of the convolution along time is inside the clip."""
    other = frame + SIGN * (tap - TIME // 2)
    return (other >= 0) & (other < FRAMES)


@triton.jit
def beside(
    here, column, beyond, left, e, lengths,
    dw: tl.constexpr, STRIP: tl.constexpr, X_N: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Load the column at distance dw from the first column of every strip; 0 outside the row and beyond `lengths`."""
    inside = e < CHANNELS
    # Compile-time conditions leave out comparisons that are always true, because they would run for every column.
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
    """Go down by one row: add the loaded row `seen` (None below x), return the sums FROM to TO - 1 from the top."""
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
            # The loaded row is REACH - m rows below the result row of these sums.
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
    """Return a row plus STRIP columns of `values`, from FIRST on, times the weights w of one tap."""
    added = ()
    for c in tl.static_range(0, STRIP):
        added = added + (row[c] + values[FIRST + c].to(tl.float32) * w,)
    return added


@triton.jit
def tap_of(
    space, time, e, tap: tl.constexpr, SPACE: tl.constexpr, TIME: tl.constexpr, TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return the weights of one tap within a frame; the centre also includes the centre of the convolution in time."""
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
    """Write the topmost row of sums, which is complete, plus the attention of this row."""
    here = out + line.to(tl.int64) * (COLUMNS * HEADS * CHANNELS)
    for c in tl.static_range(0, STRIP):
        inside = real & (e < CHANNELS)
        if COLUMNS % STRIP > 0:
            inside = inside & (column + c < COLUMNS)
        tl.store(here + c * HEADS * CHANNELS, (columns[c] + answer[c]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def apart(tile, STRIP: tl.constexpr, STRIPS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Split the transposed tile of tokens, (BLOCK_E, STRIPS * STRIP), into a tuple of STRIP columns of all strips."""
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
    """Split each tensor of 2 * HALF columns into even and odd columns; return all even parts, then all odd parts."""
    even = ()
    odd = ()
    for i in tl.static_range(0, len(tensors)):
        a, b = tl.split(tl.reshape(tensors[i], (STRIPS, BLOCK_E, HALF, 2)))
        even = even + (a,)
        odd = odd + (b,)
    return even + odd
