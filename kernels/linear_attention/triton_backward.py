"""The kernels of linear attention's gradient: queries first, which sum the gradient of S, then keys and values.

The first reads queries and gradients and needs no results: with g the gradient of o and z the divisor,
g . o = (R q . S g) / z, and the gradient of q needs S g anyway. The second has the shape of `read_state`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from postgen.kernels.linear_attention.triton_tiles import (
    existence,
    feature,
    fetch,
    fetch_matrix,
    fetch_vector,
    fold,
    fold_weighted,
    neighbour,
    normed,
    put,
    put_sums,
    slope,
    times_state,
    turn,
)


@triton.jit
def grad_queries(
    gradient, query, rstd, weight, rope, states, key_sums, d_query, matrices, vectors,
    gradient_b, gradient_n, gradient_h, gradient_d, query_b, query_n, query_h, query_d, weight_h,
    tokens, tiles, norm_eps, eps,
    RELU: tl.constexpr, NORM: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    END_T: tl.constexpr, END_H: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one split of normed queries, and their sums: of S into `matrices`, k' into `vectors`."""
    head, heads, sample = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    which = sample * heads + head
    gradient += sample * gradient_b + head.to(tl.int64) * gradient_h
    query += sample * query_b + head.to(tl.int64) * query_h
    d_query += (sample * tokens * heads + head) * CHANNELS
    if weight is not None:
        weight += head * weight_h
    if rstd is not None:
        rstd += sample * tokens
    state = tl.trans(fetch_matrix(states, which, CHANNELS, BLOCK_D))
    high = state.to(DOT)
    low = (state - high.to(tl.float32)).to(DOT)
    key_sum = fetch_vector(key_sums, which, CHANNELS, BLOCK_D)

    d_state = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    d_key_sum = tl.zeros((16, BLOCK_D), dtype=tl.float32)
    row = tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * tiles * BLOCK_N
    for _ in range(0, tl.minimum(tiles, tl.cdiv(tokens - start, BLOCK_N))):
        g = fetch(gradient, start, row, gradient_n, gradient_d, tokens, CHANNELS, BLOCK_D)
        x = fetch(query, start, row, query_n, query_d, tokens, CHANNELS, BLOCK_D)
        x = normed(x, rstd, weight, start, row, tokens, norm_eps, NORM, CHANNELS, BLOCK_D)
        q = feature(x, start, row, tokens, RELU, CHANNELS, BLOCK_D)
        if rope is None:
            q = q.to(DOT).to(tl.float32)
        inverse = 1.0 / (tl.sum(q * key_sum[None, :], axis=1) + eps)
        # Rounded once for both products: scaling all keys changes nothing, and so their gradients cancel.
        g = (g.to(tl.float32) * inverse[:, None]).to(DOT)
        n = times_state(g, high, low, existence(start, row, tokens), PRECISION)
        n = turn(n, rope, start, row, tokens, FRAMES, ROWS, COLUMNS, END_T, END_H, True, CHANNELS, BLOCK_N, BLOCK_D)
        # Turned back, n meets the query as it was: the same product as before.
        p = tl.sum(q * n, axis=1) * inverse
        n = (n - p[:, None] * key_sum[None, :]) * slope(x, RELU)
        put(d_query, start, row, heads * CHANNELS, tokens, n, CHANNELS, BLOCK_D)
        d_key_sum -= fold_weighted(p, q, BLOCK_N, BLOCK_D)
        q = turn(q, rope, start, row, tokens, FRAMES, ROWS, COLUMNS, END_T, END_H, False, CHANNELS, BLOCK_N, BLOCK_D)
        d_state = tl.dot(tl.trans(g), q.to(DOT), d_state, input_precision=PRECISION)
        start += BLOCK_N

    part = which * tl.num_programs(1) + tl.program_id(1)
    put_sums(matrices, vectors, part, tl.trans(d_state), tl.sum(d_key_sum, axis=0), CHANNELS, BLOCK_D)


@triton.jit
def grad_keys(
    key, value, rstd, weight, rope, lengths, d_states, d_key_sums, d_key, d_value,
    key_b, key_n, key_h, key_d, value_b, value_n, value_h, value_d, weight_h, tokens, tiles, norm_eps,
    RELU: tl.constexpr, NORM: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    END_T: tl.constexpr, END_H: tl.constexpr, ADDS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one range of normed keys and of values; 0 beyond the lengths.

    With ADDS, `d_value` holds the gradient of the values through the convolutions, and the rest is added to it.
    """
    head, heads, sample = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    which = sample * heads + head
    end = tokens
    if lengths is not None:
        end = tl.minimum(tokens, tl.load(lengths + sample).to(tl.int32))
    key += sample * key_b + head.to(tl.int64) * key_h
    value += sample * value_b + head.to(tl.int64) * value_h
    d_key += (sample * tokens * heads + head) * CHANNELS
    d_value += (sample * tokens * heads + head) * CHANNELS
    if weight is not None:
        weight += head * weight_h
    if rstd is not None:
        rstd += sample * tokens
    d_state = fetch_matrix(d_states, which, CHANNELS, BLOCK_D)
    high = d_state.to(DOT)
    # All keys meet the same rounding of it, which a sum over them keeps while the rest cancels.
    low = tl.trans((d_state - high.to(tl.float32)).to(DOT))
    d_key_sum = fetch_vector(d_key_sums, which, CHANNELS, BLOCK_D)

    row = tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * tiles * BLOCK_N
    for _ in range(0, tl.minimum(tiles, tl.cdiv(tokens - start, BLOCK_N))):
        x = fetch(key, start, row, key_n, key_d, end, CHANNELS, BLOCK_D)
        v = fetch(value, start, row, value_n, value_d, end, CHANNELS, BLOCK_D)
        x = normed(x, rstd, weight, start, row, end, norm_eps, NORM, CHANNELS, BLOCK_D)
        n = times_state(v.to(DOT), tl.trans(high), low, existence(start, row, end), PRECISION)
        n = turn(n, rope, start, row, end, FRAMES, ROWS, COLUMNS, END_T, END_H, True, CHANNELS, BLOCK_N, BLOCK_D)
        n = tl.where((start + row < end)[:, None], (n + d_key_sum[None, :]) * slope(x, RELU), 0.0)
        put(d_key, start, row, heads * CHANNELS, tokens, n, CHANNELS, BLOCK_D)
        k = feature(x, start, row, end, RELU, CHANNELS, BLOCK_D)
        k = turn(k, rope, start, row, end, FRAMES, ROWS, COLUMNS, END_T, END_H, False, CHANNELS, BLOCK_N, BLOCK_D)
        o = tl.dot(k.to(DOT), high, input_precision=PRECISION)
        if ADDS:
            o += fetch(d_value, start, row, heads * CHANNELS, 1, end, CHANNELS, BLOCK_D).to(tl.float32)
        put(d_value, start, row, heads * CHANNELS, tokens, o, CHANNELS, BLOCK_D)
        start += BLOCK_N


@triton.jit
def grad_filters(
    gradient, value, lengths, filters,
    gradient_b, gradient_n, gradient_h, gradient_d, value_b, value_n, value_h, value_d, heads, tokens, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPACE: tl.constexpr, TIME: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one tap over one split of tokens: (B, splits, taps, H, D), taps of space first."""
    tap, head, sample = tl.program_id(0), tl.program_id(1) % heads, tl.program_id(2).to(tl.int64)
    split, splits = tl.program_id(1) // heads, tl.num_programs(1) // heads
    gradient += sample * gradient_b + head.to(tl.int64) * gradient_h
    value += sample * value_b + head.to(tl.int64) * value_h
    length = tokens
    if lengths is not None:
        length = tl.minimum(tokens, tl.load(lengths + sample).to(tl.int32))
    spatial = tap < SPACE * SPACE
    side = SPACE if SPACE > 0 else 1
    dt = tl.where(spatial, 0, tap - SPACE * SPACE - TIME // 2)
    dh = tl.where(spatial, tap // side - SPACE // 2, 0)
    dw = tl.where(spatial, tap % side - SPACE // 2, 0)
    total = tl.zeros((16, BLOCK_D), dtype=tl.float32)
    row = tl.arange(0, BLOCK_N)
    start = split * tiles * BLOCK_N
    for _ in range(0, tl.minimum(tiles, tl.cdiv(tokens - start, BLOCK_N))):
        g = fetch(gradient, start, row, gradient_n, gradient_d, tokens, CHANNELS, BLOCK_D).to(tl.float32)
        v = neighbour(
            value, start, value_n, value_d, tokens, length, dt, dh, dw, ROWS, COLUMNS, CHANNELS, BLOCK_N, BLOCK_D
        )
        total += fold(g * v, BLOCK_N, BLOCK_D)
        start += BLOCK_N
    d = tl.arange(0, BLOCK_D)
    part = (sample * splits + split) * tl.num_programs(0) + tap
    tl.store(filters + (part * heads + head) * CHANNELS + d, tl.sum(total, axis=0), mask=d < CHANNELS)
