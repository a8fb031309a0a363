"""The kernels of linear attention's gradient: queries first, which sum the gradient of S, then keys and values.

The first reads queries and gradients and needs no results: with g the gradient of o and z the divisor,
g . o = (R q . S g) / z, and the gradient of q needs S g anyway. The second has the shape of `read_state`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from postgen.kernels.linear_attention.triton_tiles import (
    angles,
    existence,
    feature,
    fetch,
    fetch_matrix,
    fetch_vector,
    normed,
    put,
    slope,
    terms_of,
    times_state,
    turn,
)


@triton.jit
def grad_queries(
    gradient, query, rstd, weight, table, terms, key_sums, d_query, inverses, weights,
    gradient_b, gradient_n, gradient_h, gradient_d, query_b, query_n, query_h, query_d, weight_h,
    first, tokens, tiles, norm_eps, eps,
    RELU: tl.constexpr, NORM: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TEXT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one range of normed queries, and what `sum_keys` needs for those of S and k', (B, H, N).

    That is one over the divisors, by which gradients are scaled, and the weights -p of queries in the gradient of k'.
    """
    head, heads, sample = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    which = sample * heads + head
    gradient += sample * gradient_b + head.to(tl.int64) * gradient_h
    query += sample * query_b + head.to(tl.int64) * query_h
    d_query += (sample * tokens * heads + head) * CHANNELS
    inverses += which * tokens
    weights += which * tokens
    if weight is not None:
        weight += head * weight_h
    if rstd is not None:
        rstd += sample * tokens
    high, low = terms_of(terms, which, 0, BLOCK_D, False, BLOCK_D, DOT)
    key_sum = fetch_vector(key_sums, which, CHANNELS, BLOCK_D)

    row = tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * tiles * BLOCK_N
    if table is not None:
        a, b = angles(table, first, start, row, tokens, FRAMES, ROWS, COLUMNS, TEXT, BLOCK_D)
    for _ in range(0, tl.minimum(tiles, tl.cdiv(tokens - start, BLOCK_N))):
        g = fetch(gradient, start, row, gradient_n, gradient_d, tokens, CHANNELS, BLOCK_D)
        x = fetch(query, start, row, query_n, query_d, tokens, CHANNELS, BLOCK_D)
        x = normed(x, rstd, weight, start, row, tokens, norm_eps, NORM, CHANNELS, BLOCK_D)
        q = feature(x, start, row, tokens, RELU, CHANNELS, BLOCK_D)
        if table is None and (NORM or not RELU):
            q = q.to(DOT).to(tl.float32)
        inverse = 1.0 / (tl.sum(q * key_sum[None, :], axis=1) + eps)
        # Rounded once for both products: scaling all keys changes nothing, and so their gradients cancel.
        g = (g.to(tl.float32) * inverse[:, None]).to(DOT)
        n = times_state(g, high, low, existence(start, row, tokens), PRECISION)
        if table is not None:
            n = turn(n, a, b, True, BLOCK_N, BLOCK_D)
            a, b = angles(table, first, start + BLOCK_N, row, tokens, FRAMES, ROWS, COLUMNS, TEXT, BLOCK_D)
        # Turned back, n meets the query as it was: the same product as before.
        p = tl.sum(q * n, axis=1) * inverse
        n = (n - p[:, None] * key_sum[None, :]) * slope(x, RELU)
        put(d_query, start, row, heads * CHANNELS, tokens, n, CHANNELS, BLOCK_D)
        inside = start + row < tokens
        tl.store(inverses + start + row, inverse, mask=inside)
        tl.store(weights + start + row, -p, mask=inside)
        start += BLOCK_N


@triton.jit
def grad_keys(
    key, value, rstd, weight, table, lengths, d_states, d_key_sums, d_key, d_value,
    key_b, key_n, key_h, key_d, value_b, value_n, value_h, value_d, weight_h, first, tokens, tiles, norm_eps,
    RELU: tl.constexpr, NORM: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TEXT: tl.constexpr, ADDS: tl.constexpr,
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
    if table is not None:
        a, b = angles(table, first, start, row, tokens, FRAMES, ROWS, COLUMNS, TEXT, BLOCK_D)
    for _ in range(0, tl.minimum(tiles, tl.cdiv(tokens - start, BLOCK_N))):
        x = fetch(key, start, row, key_n, key_d, end, CHANNELS, BLOCK_D)
        v = fetch(value, start, row, value_n, value_d, end, CHANNELS, BLOCK_D)
        x = normed(x, rstd, weight, start, row, end, norm_eps, NORM, CHANNELS, BLOCK_D)
        n = times_state(v.to(DOT), tl.trans(high), low, existence(start, row, end), PRECISION)
        if table is not None:
            n = turn(n, a, b, True, BLOCK_N, BLOCK_D)
        n = tl.where((start + row < end)[:, None], (n + d_key_sum[None, :]) * slope(x, RELU), 0.0)
        put(d_key, start, row, heads * CHANNELS, tokens, n, CHANNELS, BLOCK_D)
        k = feature(x, start, row, end, RELU, CHANNELS, BLOCK_D)
        if table is not None:
            k = turn(k, a, b, False, BLOCK_N, BLOCK_D)
            a, b = angles(table, first, start + BLOCK_N, row, tokens, FRAMES, ROWS, COLUMNS, TEXT, BLOCK_D)
        o = tl.dot(k.to(DOT), high, input_precision=PRECISION)
        if ADDS:
            o += fetch(d_value, start, row, heads * CHANNELS, 1, end, CHANNELS, BLOCK_D).to(tl.float32)
        put(d_value, start, row, heads * CHANNELS, tokens, o, CHANNELS, BLOCK_D)
        start += BLOCK_N
