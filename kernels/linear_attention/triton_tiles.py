"""Operations of the linear attention kernels on one tile: loads and stores, norm, feature map, rotation, products.

A tile has BLOCK_N tokens and BLOCK_D channels of one head, in float32, with 0 for tokens and channels that do not
exist. Its tokens are `start` + `row`, with a vector `row` of offsets; tokens from `end` on do not exist.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fetch(base, start, row, stride_n, stride_d, end, channels, BLOCK_D: tl.constexpr):
    """Load a tile, in the dtype of the tensor."""
    row = row[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (start + row < end) & (d < channels)
    # 64-bit integers, because a projection of two samples of a long clip has more than 2^31 numbers.
    tile = base + start.to(tl.int64) * stride_n + row.to(tl.int64) * stride_n + d.to(tl.int64) * stride_d
    return tl.load(tile, mask=inside, other=0.0)


@triton.jit
def put(base, start, row, stride_n, end, tile, channels, BLOCK_D: tl.constexpr):
    """Store a tile in a tensor whose channels are contiguous."""
    row = row[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (start + row < end) & (d < channels)
    place = base + start.to(tl.int64) * stride_n + row.to(tl.int64) * stride_n + d
    tl.store(place, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def of_head(base, sample, head, stride_b, stride_h, by, WHOLE: tl.constexpr):
    """Return the pointer to a head of a sample plus the offset `by`; a descriptor (WHOLE) does not change."""
    moved = base
    if not WHOLE:
        moved = base + sample * stride_b + head.to(tl.int64) * stride_h + by
    return moved


@triton.jit
def of_result(base, sample, head, by, tokens, heads, CHANNELS: tl.constexpr, WHOLE: tl.constexpr):
    """Return the same as `of_head` for a contiguous tensor; None stays None."""
    moved = base
    if not WHOLE:
        moved = further(base, (sample * tokens * heads + head) * CHANNELS + by)
    return moved


@triton.jit
def take(
    base, sample, start, column, row, stride_n, stride_d, end, channels, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr
):
    """Load a tile, in the dtype of the tensor; with WHOLE, `base` is a descriptor and one copy loads the tile."""
    if WHOLE:
        tile = base.load([sample.to(tl.int32), start, tl.cast(column, tl.int32)])
        tile = tl.reshape(tile, (row.shape[0], BLOCK_D))
    else:
        tile = fetch(base, start, row, stride_n, stride_d, end, channels, BLOCK_D)
    return tile


@triton.jit
def give(base, sample, start, column, row, stride_n, end, tile, channels, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr):
    """Store a tile; with WHOLE, `base` is a descriptor, as in `take`."""
    if WHOLE:
        tile = tl.reshape(tile.to(base.dtype), (1, row.shape[0], BLOCK_D))
        base.store([sample.to(tl.int32), start, tl.cast(column, tl.int32)], tile)
    else:
        put(base, start, row, stride_n, end, tile, channels, BLOCK_D)


@triton.jit
def fetch_block(
    base, which, row, column,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Load HEIGHT rows and WIDTH columns, from `row` and `column` on, of the (D, D) matrix with index `which`."""
    r = (row + tl.arange(0, HEIGHT))[:, None]
    c = (column + tl.arange(0, WIDTH))[None, :]
    places = base + which * CHANNELS * CHANNELS + r * CHANNELS + c
    return tl.load(places, mask=(r < CHANNELS) & (c < CHANNELS), other=0.0)


@triton.jit
def fetch_vector(base, which, channels, BLOCK_D: tl.constexpr):
    """Load the vector of D numbers with index `which`."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(base + which * channels + d, mask=d < channels, other=0.0)


@triton.jit
def put_sums(
    matrices, vectors, which, part, matrix, vector,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Store BLOCK_E columns of the (D, D) matrix with index `which`; the program of part 0 stores the vector."""
    d = tl.arange(0, BLOCK_D)
    e = part * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    places = matrices + which * CHANNELS * CHANNELS + d[:, None] * CHANNELS + e
    tl.store(places, matrix, mask=(d[:, None] < CHANNELS) & (e < CHANNELS))
    tl.store(vectors + which * CHANNELS + d, vector, mask=(d < CHANNELS) & (part == 0))


@triton.jit
def place_of(BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the head of this program, its part of the channels of a wide head, its sample, and the head count."""
    PARTS: tl.constexpr = BLOCK_D // BLOCK_E
    if PARTS == 1:
        head = tl.program_id(0)
        part = 0
    else:
        head = tl.program_id(0) // PARTS
        part = tl.program_id(0) % PARTS
    return head, part, tl.program_id(2).to(tl.int64), tl.num_programs(0) // PARTS


@triton.jit
def further(pointer, by):
    """Return the pointer plus the offset `by`; None stays None."""
    moved = pointer
    if pointer is not None:
        moved = pointer + by
    return moved


@triton.jit
def end_of(lengths, sample, tokens):
    """Return the number of valid tokens of a sample."""
    end = tokens
    if lengths is not None:
        end = tl.minimum(tokens, tl.load(lengths + sample).to(tl.int32))
    return end


@triton.jit
def numbers_of(base, start, row, end):
    """Load one number for every token of a tile; 0 for tokens that do not exist."""
    return tl.load(base + start + row, mask=start + row < end, other=0.0)


@triton.jit
def channels_of(part, CHANNELS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the number of channels from the start of a part on; a compile-time constant if the part is full."""
    if CHANNELS % BLOCK_E == 0:
        left = BLOCK_E
    elif CHANNELS < BLOCK_E:
        left = CHANNELS
    else:
        left = CHANNELS - part * BLOCK_E
    return left


@triton.jit
def columns_of(x, part, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the BLOCK_E columns of a tile that belong to a part; without parts, the whole tile."""
    PARTS: tl.constexpr = BLOCK_D // BLOCK_E
    if PARTS > 1:
        mine = (tl.arange(0, PARTS) == part)[None, :, None]
        x = tl.sum(tl.where(mine, tl.reshape(x, (BLOCK_N, PARTS, BLOCK_E)), 0.0), axis=1).to(x.dtype)
    return x


@triton.jit
def normed(
    x, rstd, weight, start, row, end, norm_eps,
    NORM: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return a tile after RMSNorm, over the channels of the head, or across heads if `rstd` is given."""
    x = x.to(tl.float32)
    if NORM:
        if rstd is None:
            reciprocal = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / CHANNELS + norm_eps)
        else:
            token = start + row
            reciprocal = tl.load(rstd + token, mask=token < end, other=0.0)
        x = x * reciprocal[:, None]
        if weight is not None:
            x = x * fetch_vector(weight, 0, CHANNELS, BLOCK_D).to(tl.float32)[None, :]
    return x


@triton.jit
def feature(
    x, start, row, end,
    RELU: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return phi(x): ReLU, or elu(x) + 1 with a mask, because elu(0) + 1 is not 0 for tokens that do not exist."""
    if RELU:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        inside = (start + row < end)[:, None] & (tl.arange(0, BLOCK_D) < CHANNELS)[None, :]
        x = tl.where(inside, tl.where(x > 0, x + 1.0, tl.exp(x)), 0.0)
    return x


@triton.jit
def slope(x, RELU: tl.constexpr):
    """Return the derivative of phi at x; for ReLU it is 0 at x = 0."""
    below = 0.0 if RELU else tl.exp(tl.minimum(x, 0.0))
    return tl.where(x > 0, 1.0, below)


@triton.jit
def angles(
    table, first, start, row, end,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TEXT: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Load alternating cosines and sines of WIDTH channels as two tiles, of lines and of columns, whose sum is used.

    Each channel rotates with one axis, so one of the two tiles is 0. Every token loads a contiguous row of the table
    of `spread_rope` for each tile. Tokens that do not exist are 0, so their angle does not matter.
    """
    token = tl.maximum(tl.minimum(start + row, end - 1), 0)
    if TEXT:
        token -= first
        video = (token >= 0) & (token < FRAMES * ROWS * COLUMNS)
        line = tl.where(video, token // COLUMNS, FRAMES * ROWS)
        column = tl.where(video, token % COLUMNS, COLUMNS)
    else:
        line = token // COLUMNS
        column = token % COLUMNS
    d = tl.arange(0, WIDTH)[None, :]
    of_lines = tl.load(table + line[:, None] * BLOCK_D + d)
    of_columns = tl.load(table + (FRAMES * ROWS + 1 + column)[:, None] * BLOCK_D + d)
    return of_lines, of_columns


@triton.jit
def turn(x, of_lines, of_columns, BACK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rotate each pair of neighbouring channels by the result of `angles`; BACK rotates in the other direction."""
    even, odd = tl.split(tl.reshape(x, (BLOCK_N, BLOCK_D // 2, 2)))
    both = (of_lines + of_columns).to(tl.float32)
    cosine, sine = tl.split(tl.reshape(both, (BLOCK_N, BLOCK_D // 2, 2)))
    if BACK:
        sine = -sine
    turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    return tl.reshape(turned, (BLOCK_N, BLOCK_D))


@triton.jit
def fold(x, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum rows with a distance of 16, (16, BLOCK_D). One thread holds such rows, so threads need not exchange data."""
    return tl.sum(tl.reshape(x, (BLOCK_N // 16, 16, BLOCK_D)), axis=0)


@triton.jit
def fold_weighted(weight, x, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the same as `fold`, with each row multiplied by its weight."""
    rows = tl.reshape(x, (BLOCK_N // 16, 16, BLOCK_D))
    return tl.sum(rows * tl.reshape(weight, (BLOCK_N // 16, 16))[:, :, None], axis=0)


@triton.jit
def times_state(x, high, low, scale, CHAINED: tl.constexpr, PRECISION: tl.constexpr):
    """Return a tile times a matrix, with each row multiplied by its scale.

    The matrix is the sum of two 16-bit terms, `high` and `low`, or a single float32 term. Chained products (the second
    adds to the result of the first) place all warps along the tokens, which needs 16 rows per warp. CHAINED states
    that the tile has these rows; chained products then need registers for one result only. Otherwise the two products
    are scaled and added separately.
    """
    product = tl.dot(x, high, input_precision=PRECISION)
    if CHAINED and x.dtype == tl.bfloat16:
        product = tl.dot(x, low, product) * scale[:, None]
    else:
        product *= scale[:, None]
        if x.dtype == tl.bfloat16:
            product += tl.dot(x, low) * scale[:, None]
    return product


@triton.jit
def existence(start, row, end):
    """Return 1 for tokens of a tile that exist, and 0 for others."""
    return tl.where(start + row < end, 1.0, 0.0)


@triton.jit
def question(
    q, key_sum, rstd, weight, table, of_lines, of_columns, start, row, end, norm_eps, eps,
    RELU: tl.constexpr, NORM: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Return the rotated features of a tile of queries, to multiply with the state, and one over their divisors."""
    q = normed(q, rstd, weight, start, row, end, norm_eps, NORM, CHANNELS, BLOCK_D)
    q, inverse = with_divisor(q, key_sum, table, start, row, end, eps, RELU, NORM, CHANNELS, BLOCK_D, DOT)
    if table is not None:
        q = turn(q, of_lines, of_columns, False, BLOCK_N, BLOCK_D)
    return q.to(DOT), inverse


@triton.jit
def with_divisor(
    x, key_sum, table, start, row, end, eps,
    RELU: tl.constexpr, NORM: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Return the features of normalised queries, not rotated, and one over their divisors."""
    q = feature(x, start, row, end, RELU, CHANNELS, BLOCK_D)
    if table is None and (NORM or not RELU):
        # Round here, so that numerator and divisor use the same numbers and errors common to all tokens cancel.
        q = q.to(DOT).to(tl.float32)
    return q, 1.0 / (tl.sum(q * key_sum[None, :], axis=1) + eps)


@triton.jit
def terms_of(
    terms, which, part, BLOCK_E: tl.constexpr, STACKED: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr
):
    """Load BLOCK_E rows of the transposed state as two 16-bit terms; with STACKED, as one matrix of both terms.

    The format is that of `join_splits`. Since the terms need no computation, they go to the product without passing
    through the registers of threads.
    """
    COUNT: tl.constexpr = 2 if tl.bfloat16 == DOT else 1
    STACK: tl.constexpr = COUNT if STACKED else 1
    d = tl.arange(0, BLOCK_D)[None, :]
    r = tl.arange(0, STACK * BLOCK_E)[:, None]
    terms += which * (COUNT * BLOCK_D * BLOCK_D) + part * (BLOCK_E * BLOCK_D)
    high = tl.load(terms + (r // BLOCK_E * BLOCK_D + r % BLOCK_E) * BLOCK_D + d)
    low = high
    if COUNT > STACK:
        low = tl.load(terms + (BLOCK_D + r) * BLOCK_D + d)
    return high, low


@triton.jit
def state_times(high, low, x, scale, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr):
    """Return the transpose of (tile times state), with the result of each token multiplied by its scale.

    `x` is the transposed tile, `high` and `low` are the terms of the transposed state. Here the tile is the operand in
    shared memory, so no warp repeats the work of another warp on it. If both terms are stacked in `high` (more than
    BLOCK_E rows), there is one product to wait for instead of two, which takes more registers.
    """
    product = tl.dot(high, x, input_precision=PRECISION)
    if high.shape[0] > BLOCK_E:
        product = tl.sum(tl.reshape(product, (2, BLOCK_E, x.shape[1])), axis=0)
    elif x.dtype == tl.bfloat16:
        product = tl.dot(low, x, product)
    return product * scale[None, :]


@triton.jit
def share_of(
    program, blocks, whole, bands, band, HEADS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Return the sample, head, part of the channels, block, first row and end row of a program; see `Share`."""
    others = tl.maximum(program - whole, 0)
    block = tl.minimum(program, whole + others // bands)
    top = others % bands * band
    bottom = tl.where(program < whole, ROWS, tl.minimum(top + band, ROWS))
    copy = block // PARTS // blocks
    return (copy // HEADS).to(tl.int64), copy % HEADS, block % PARTS, block // PARTS % blocks, top, bottom
