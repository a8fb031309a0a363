"""Kernels of the gradient of linear attention: `grad_queries` for queries, `grad_keys` for keys and values.

`grad_queries` needs the gradient g of the output o, but not o itself: with the divisor z, g . o = (R q . S g) / z, and
the gradient of q contains S g anyway. `grad_keys` has the structure of `read_state`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from postgen.kernels.linear_attention.triton_tiles import (
    angles,
    channels_of,
    columns_of,
    end_of,
    existence,
    feature,
    fetch,
    fetch_block,
    fetch_vector,
    further,
    give,
    normed,
    numbers_of,
    of_head,
    of_result,
    place_of,
    slope,
    take,
    times_state,
    turn,
    with_divisor,
)


@triton.jit
def grad_queries(
    gradient, query, rstd, weight, table, terms, key_sums, found, d_query, inverses, weights,
    gradient_b, gradient_n, gradient_h, gradient_d, query_b, query_n, query_h, query_d, weight_h, first, tokens, tiles,
    norm_eps, eps, RELU: tl.constexpr, NORM: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TEXT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one range of normalised queries, and two values per query for the gradients of S and k'.

    The values are inputs of `sum_keys`: `inverses`, (B, H, N), one over the divisors, which scales the gradients; and
    `weights`, -p, the weights of queries in the gradient of k'. For wide heads each program computes one part of the
    channels and knows only its share of p. Without `d_query`, a launch writes these shares, (parts, B, H, N), and the
    next launch receives their sum as `found`.
    """
    head, part, sample, heads = place_of(BLOCK_D, BLOCK_E)
    which = sample * heads + head
    channels = channels_of(part, CHANNELS, BLOCK_E)
    gradient = of_head(gradient, sample, head, gradient_b, gradient_h, 0, WHOLE)
    query = of_head(query, sample, head, query_b, query_h, 0, WHOLE)
    d_query = of_result(d_query, sample, head, part * BLOCK_E, tokens, heads, CHANNELS, WHOLE)
    found = further(found, which * tokens)
    weights += (part * tl.num_programs(2) * heads + which) * tokens
    table = further(table, part * BLOCK_E)
    weight = further(weight, head * weight_h)
    rstd = further(rstd, sample * tokens)
    high, low = columns_of_terms(terms, which, part, BLOCK_D, BLOCK_E, DOT)
    key_sum = fetch_vector(key_sums, which, CHANNELS, BLOCK_D)
    own_sum = fetch_vector(key_sums + which * CHANNELS + part * BLOCK_E, 0, channels, BLOCK_E)

    row = tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * tiles * BLOCK_N
    if table is not None:
        a, b = angles(table, first, start, row, tokens, FRAMES, ROWS, COLUMNS, TEXT, BLOCK_D, BLOCK_E)
    for _ in range(0, tl.minimum(tiles, tl.cdiv(tokens - start, BLOCK_N))):
        at = head * gradient_h
        g = take(gradient, sample, start, at, row, gradient_n, gradient_d, tokens, CHANNELS, BLOCK_D, WHOLE)
        x = take(query, sample, start, head * query_h, row, query_n, query_d, tokens, CHANNELS, BLOCK_D, WHOLE)
        x = normed(x, rstd, weight, start, row, tokens, norm_eps, NORM, CHANNELS, BLOCK_D)
        q, inverse = with_divisor(x, key_sum, table, start, row, tokens, eps, RELU, NORM, CHANNELS, BLOCK_D, DOT)
        # Both products use the same rounded numbers, so gradients along a scaling of all keys cancel, as they must.
        g = (g.to(tl.float32) * inverse[:, None]).to(DOT)
        n = times_state(g, high, low, existence(start, row, tokens), CHAINED, PRECISION)
        if table is not None:
            n = turn(n, a, b, True, BLOCK_N, BLOCK_E)
            a, b = angles(table, first, start + BLOCK_N, row, tokens, FRAMES, ROWS, COLUMNS, TEXT, BLOCK_D, BLOCK_E)
        inside = start + row < tokens
        if found is None:
            # n is rotated back, so its product with the unrotated query equals R q . S g.
            p = tl.sum(columns_of(q, part, BLOCK_N, BLOCK_D, BLOCK_E) * n, axis=1) * inverse
            tl.store(weights + start + row, -p, mask=inside)
            tl.store(inverses + which * tokens + start + row, inverse, mask=inside & (part == 0))
        else:
            p = -numbers_of(found, start, row, tokens)
        if d_query is not None:
            n = (n - p[:, None] * own_sum[None, :]) * slope(columns_of(x, part, BLOCK_N, BLOCK_D, BLOCK_E), RELU)
            give(d_query, sample, start, head * CHANNELS, row, heads * CHANNELS, tokens, n, channels, BLOCK_E, WHOLE)
        start += BLOCK_N


@triton.jit
def columns_of_terms(terms, which, part, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, DOT: tl.constexpr):
    """Return BLOCK_E columns of the transposed state as two 16-bit terms, in the format of `join_splits`."""
    COUNT: tl.constexpr = 2 if tl.bfloat16 == DOT else 1
    r = tl.arange(0, BLOCK_D)[:, None]
    c = part * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    terms += which * (COUNT * BLOCK_D * BLOCK_D)
    high = tl.load(terms + r * BLOCK_D + c)
    low = high
    if COUNT == 2:
        low = tl.load(terms + (BLOCK_D + r) * BLOCK_D + c)
    return high, low


@triton.jit
def grad_keys(
    key, value, rstd, weight, table, lengths, d_states, d_key_sums, d_key, d_value,
    key_b, key_n, key_h, key_d, value_b, value_n, value_h, value_d, weight_h, first, tokens, tiles, norm_eps,
    RELU: tl.constexpr, NORM: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TEXT: tl.constexpr, ADDS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one range of normalised keys and of values; 0 beyond `lengths`.

    With ADDS, `d_value` already holds the gradient through the convolutions, and the kernel adds the rest.
    """
    head, part, sample, heads = place_of(BLOCK_D, BLOCK_E)
    which = sample * heads + head
    channels = channels_of(part, CHANNELS, BLOCK_E)
    end = end_of(lengths, sample, tokens)
    key = of_head(key, sample, head, key_b, key_h, 0, WHOLE)
    value = of_head(value, sample, head, value_b, value_h, 0, WHOLE)
    d_key = of_result(d_key, sample, head, part * BLOCK_E, tokens, heads, CHANNELS, WHOLE)
    d_value = of_result(d_value, sample, head, part * BLOCK_E, tokens, heads, CHANNELS, WHOLE)
    weight = further(weight, head * weight_h)
    rstd = further(rstd, sample * tokens)
    high, low, columns = rows_and_columns(d_states, which, part, CHANNELS, BLOCK_D, BLOCK_E, DOT)
    d_key_sum = fetch_vector(d_key_sums + which * CHANNELS + part * BLOCK_E, 0, channels, BLOCK_E)

    row = tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * tiles * BLOCK_N
    if table is not None:
        a, b = angles(table, first, start, row, tokens, FRAMES, ROWS, COLUMNS, TEXT, BLOCK_D, BLOCK_D)
    for _ in range(0, tl.minimum(tiles, tl.cdiv(tokens - start, BLOCK_N))):
        x = take(key, sample, start, head * key_h, row, key_n, key_d, end, CHANNELS, BLOCK_D, WHOLE)
        v = take(value, sample, start, head * value_h, row, value_n, value_d, end, CHANNELS, BLOCK_D, WHOLE)
        x = normed(x, rstd, weight, start, row, end, norm_eps, NORM, CHANNELS, BLOCK_D)
        n = times_state(v.to(DOT), tl.trans(high), low, existence(start, row, end), CHAINED, PRECISION)
        if table is not None:
            own_a, own_b = (
                columns_of(a, part, BLOCK_N, BLOCK_D, BLOCK_E),
                columns_of(b, part, BLOCK_N, BLOCK_D, BLOCK_E),
            )
            n = turn(n, own_a, own_b, True, BLOCK_N, BLOCK_E)
        n = (n + d_key_sum[None, :]) * slope(columns_of(x, part, BLOCK_N, BLOCK_D, BLOCK_E), RELU)
        n = tl.where((start + row < end)[:, None], n, 0.0)
        give(d_key, sample, start, head * CHANNELS, row, heads * CHANNELS, tokens, n, channels, BLOCK_E, WHOLE)
        k = feature(x, start, row, end, RELU, CHANNELS, BLOCK_D)
        if table is not None:
            k = turn(k, a, b, False, BLOCK_N, BLOCK_D)
            a, b = angles(table, first, start + BLOCK_N, row, tokens, FRAMES, ROWS, COLUMNS, TEXT, BLOCK_D, BLOCK_D)
        o = tl.dot(k.to(DOT), columns, input_precision=PRECISION)
        if ADDS:
            o += fetch(d_value, start, row, heads * CHANNELS, 1, end, channels, BLOCK_E).to(tl.float32)
        give(d_value, sample, start, head * CHANNELS, row, heads * CHANNELS, tokens, o, channels, BLOCK_E, WHOLE)
        start += BLOCK_N


@triton.jit
def rows_and_columns(
    d_states, which, part, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, DOT: tl.constexpr
):
    """Return BLOCK_E rows of a gradient of S as two 16-bit terms, the second transposed, and BLOCK_E columns as one.

    The rows need two terms: their rounding error is the same for all keys, so it remains in a sum over the keys while
    other errors cancel.
    """
    rows = fetch_block(d_states, which, part * BLOCK_E, 0, CHANNELS, BLOCK_E, BLOCK_D)
    high = rows.to(DOT)
    low = tl.trans((rows - high.to(tl.float32)).to(DOT))
    columns = high
    if BLOCK_D > BLOCK_E:
        columns = fetch_block(d_states, which, 0, part * BLOCK_E, CHANNELS, BLOCK_D, BLOCK_E).to(DOT)
    return high, low, columns
