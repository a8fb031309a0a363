"""The forward kernels of linear attention: sum over the keys, join the sums, and read the state with the queries.

Programs sum over splits of the tokens. Each program writes its sums, and the sums are added in a fixed order without
atomics, so equal inputs give bitwise equal results.

Attention is diffuse: most of S = sum R k v^T comes from the mean value. If S were rounded to 16 bits, few bits would
remain for the differences between tokens. The products therefore use S as the sum of two 16-bit numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from postgen.kernels.linear_attention.triton_tiles import (
    angles,
    channels_of,
    end_of,
    feature,
    fetch_vector,
    fold,
    fold_weighted,
    further,
    give,
    normed,
    numbers_of,
    of_head,
    place_of,
    put_sums,
    question,
    state_times,
    take,
    terms_of,
    turn,
)


@triton.jit
def token_rstd(
    x, rstd, x_b, x_n, x_h, x_d, norm_eps,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write 1 / RMS of every token over all its heads to `rstd`, (B, N)."""
    token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    place = x + sample * x_b + token * x_n + h * x_h + d * x_d
    values = tl.load(place, mask=(h < HEADS) & (d < CHANNELS), other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(values * values, axis=1), axis=0) / (HEADS * CHANNELS)
    tl.store(rstd + sample * tl.num_programs(0) + token, 1.0 / tl.sqrt(mean + norm_eps))


@triton.jit
def sum_keys(
    key, value, rstd, weight, table, lengths, scales, weights, matrices, vectors,
    key_b, key_n, key_h, key_d, value_b, value_n, value_h, value_d, weight_h, first, tokens, tiles, norm_eps,
    RELU: tl.constexpr, NORM: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TEXT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write the sums over one split of tokens: R k v^T to `matrices`, k to `vectors`.

    The backward pass gives `scales` and `weights`, (B, H, N): a factor for every v, and a factor for every k in the
    sum of k.
    """
    head, part, sample, heads = place_of(BLOCK_D, BLOCK_E)
    end = end_of(lengths, sample, tokens)
    key = of_head(key, sample, head, key_b, key_h, 0, WHOLE)
    value = of_head(value, sample, head, value_b, value_h, part * BLOCK_E * value_d, WHOLE)
    channels = channels_of(part, CHANNELS, BLOCK_E)
    weight = further(weight, head * weight_h)
    rstd = further(rstd, sample * tokens)
    scales = further(scales, (sample * heads + head) * tokens)
    weights = further(weights, (sample * heads + head) * tokens)

    state = tl.zeros((BLOCK_E, BLOCK_D), dtype=tl.float32)
    key_sum = tl.zeros((16, BLOCK_D), dtype=tl.float32)
    row = tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * tiles * BLOCK_N
    # Angles and other small loads are loaded one tile ahead, in registers. Operands of products use shared memory.
    if table is not None:
        a, b = angles(table, first, start, row, end, FRAMES, ROWS, COLUMNS, TEXT, BLOCK_D, BLOCK_D)
    if scales is not None:
        scale, share = numbers_of(scales, start, row, end), numbers_of(weights, start, row, end)
    for _ in range(0, tl.minimum(tiles, tl.cdiv(end - start, BLOCK_N))):
        k = take(key, sample, start, head * key_h, row, key_n, key_d, end, CHANNELS, BLOCK_D, WHOLE)
        v = take(value, sample, start, head * value_h, row, value_n, value_d, end, channels, BLOCK_E, WHOLE)
        k = normed(k, rstd, weight, start, row, end, norm_eps, NORM, CHANNELS, BLOCK_D)
        k = feature(k, start, row, end, RELU, CHANNELS, BLOCK_D)
        if table is None and (NORM or not RELU):
            # Numerator and divisor use the same rounded numbers, so errors that all tokens share cancel.
            k = k.to(DOT).to(tl.float32)
        if scales is None:
            key_sum += fold(k, BLOCK_N, BLOCK_D)
        else:
            key_sum += fold_weighted(share, k, BLOCK_N, BLOCK_D)
            v = v.to(tl.float32) * scale[:, None]
            scale = numbers_of(scales, start + BLOCK_N, row, end)
            share = numbers_of(weights, start + BLOCK_N, row, end)
        if table is not None:
            k = turn(k, a, b, False, BLOCK_N, BLOCK_D)
            a, b = angles(table, first, start + BLOCK_N, row, end, FRAMES, ROWS, COLUMNS, TEXT, BLOCK_D, BLOCK_D)
        # Compute S^T, so that the transposed operand is v, which goes from memory to the product without a thread.
        state = tl.dot(tl.trans(v.to(DOT)), k.to(DOT), state, input_precision=PRECISION)
        start += BLOCK_N

    split = (sample * heads + head) * tl.num_programs(1) + tl.program_id(1)
    put_sums(matrices, vectors, split, part, tl.trans(state), tl.sum(key_sum, axis=0), CHANNELS, BLOCK_D, BLOCK_E)


@triton.jit
def join_splits(
    matrices, vectors, first_matrix, first_vector, matrix, vector, terms, splits,
    CHANNELS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Add up the sums of the splits and the initial values; each program computes BLOCK_R rows.

    If `terms` is given, it receives the transposed matrix in the form for `read_state`, padded to BLOCK_D rows and
    columns: one float32 matrix, or two 16-bit matrices whose sum it is.
    """
    which = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    split = tl.arange(0, BLOCK_S)
    there = split < splits
    part = which * splits + split
    square = r[:, None] * CHANNELS + d[None, :]
    inside = (r[:, None] < CHANNELS) & (d < CHANNELS)
    places = matrices + part[:, None, None] * CHANNELS * CHANNELS + square[None, :, :]
    found = tl.sum(tl.load(places, mask=there[:, None, None] & inside[None, :, :], other=0.0), axis=0)
    places = vectors + part[:, None] * CHANNELS + r[None, :]
    sums = tl.sum(tl.load(places, mask=there[:, None] & (r < CHANNELS)[None, :], other=0.0), axis=0)
    if first_matrix is not None:
        found += tl.load(first_matrix + which * CHANNELS * CHANNELS + square, mask=inside, other=0.0).to(tl.float32)
    if first_vector is not None:
        sums += tl.load(first_vector + which * CHANNELS + r, mask=r < CHANNELS, other=0.0).to(tl.float32)
    tl.store(matrix + which * CHANNELS * CHANNELS + square, found, mask=inside)
    tl.store(vector + which * CHANNELS + r, sums, mask=r < CHANNELS)
    if terms is not None:
        COUNT: tl.constexpr = 2 if tl.bfloat16 == DOT else 1
        places = terms + which * (COUNT * BLOCK_D * BLOCK_D) + d[None, :] * BLOCK_D + r[:, None]
        inside = (r < BLOCK_D)[:, None]
        high = found.to(DOT)
        tl.store(places, high, mask=inside)
        if COUNT == 2:
            tl.store(places + BLOCK_D * BLOCK_D, (found - high.to(tl.float32)).to(DOT), mask=inside)


@triton.jit
def read_state(
    query, rstd, weight, table, terms, key_sums, out,
    query_b, query_n, query_h, query_d, out_b, weight_h, first, tokens, tiles, norm_eps, eps,
    RELU: tl.constexpr, NORM: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TEXT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write the attention of one range of queries, for calls or tokens without a convolution."""
    head, part, sample, heads = place_of(BLOCK_D, BLOCK_E)
    which = sample * heads + head
    query = of_head(query, sample, head, query_b, query_h, 0, WHOLE)
    out = of_head(out, sample, head, out_b, CHANNELS, part * BLOCK_E, WHOLE)
    weight = further(weight, head * weight_h)
    rstd = further(rstd, sample * tokens)
    high, low = terms_of(terms, which, part, BLOCK_E, False, BLOCK_D, DOT)
    key_sum = fetch_vector(key_sums, which, CHANNELS, BLOCK_D)

    row = tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * tiles * BLOCK_N
    a = 0.0
    b = 0.0
    if table is not None:
        a, b = angles(table, first, start, row, tokens, FRAMES, ROWS, COLUMNS, TEXT, BLOCK_D, BLOCK_D)
    for _ in range(0, tl.minimum(tiles, tl.cdiv(tokens - start, BLOCK_N))):
        q = take(query, sample, start, head * query_h, row, query_n, query_d, tokens, CHANNELS, BLOCK_D, WHOLE)
        q, scale = question(
            q, key_sum, rstd, weight, table, a, b, start, row, tokens, norm_eps, eps,
            RELU, NORM, CHANNELS, BLOCK_N, BLOCK_D, DOT,
        )  # fmt: skip
        if table is not None:
            a, b = angles(table, first, start + BLOCK_N, row, tokens, FRAMES, ROWS, COLUMNS, TEXT, BLOCK_D, BLOCK_D)
        o = tl.trans(state_times(high, low, tl.trans(q), scale, BLOCK_E, PRECISION))
        give(
            out, sample, start, head * CHANNELS, row, heads * CHANNELS, tokens, o,
            channels_of(part, CHANNELS, BLOCK_E), BLOCK_E, WHOLE,
        )  # fmt: skip
        start += BLOCK_N
