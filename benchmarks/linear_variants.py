"""Scratch: candidate kernels of linear attention, timed pass by pass."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

HALF = tl.constexpr(tl.float16 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16)
EXACT = torch.float16 if os.environ.get("TRITON_INTERPRET") == "1" else torch.bfloat16


@triton.jit
def tile(base, start, head, row, stride_n, end, HEADS, D: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        x = base.load([start, head * D])
    else:
        d = tl.arange(0, D)
        place = base + start.to(tl.int64) * stride_n + head * D + row.to(tl.int64)[:, None] * stride_n + d[None, :]
        x = tl.load(place, mask=(start + row < end)[:, None], other=0.0)
    return x


@triton.jit
def relu(x):
    return tl.maximum(x.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def write(base, start, head, row, end, x, HEADS, D: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        base.store([start, head * D], x)
    else:
        d = tl.arange(0, D)
        place = base + start.to(tl.int64) * (HEADS * D) + head * D + row[:, None] * (HEADS * D) + d[None, :]
        tl.store(place, x, mask=(start + row < end)[:, None])


@triton.jit
def angles(frame_rows, columns, start, row, end, COLUMNS: tl.constexpr, D: tl.constexpr):
    token = tl.minimum(start + row, end - 1)
    d = tl.arange(0, D)[None, :]
    a = tl.load(frame_rows + (token // COLUMNS)[:, None] * D + d)
    b = tl.load(columns + (token % COLUMNS)[:, None] * D + d)
    return a, b


@triton.jit
def turn(x, a, b, BACK: tl.constexpr, D: tl.constexpr, BN: tl.constexpr):
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (BN, D // 2, 2)))
    cosine, sine = tl.split(tl.reshape((a + b).to(tl.float32), (BN, D // 2, 2)))
    if BACK:
        sine = -sine
    return tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (BN, D))


@triton.jit
def fold(x, BN: tl.constexpr, D: tl.constexpr):
    return tl.sum(tl.reshape(x, (BN // 16, 16, D)), axis=0)


@triton.jit
def fold_weighted(weight, x, BN: tl.constexpr, D: tl.constexpr):
    rows = tl.reshape(x, (BN // 16, 16, D))
    return tl.sum(rows * tl.reshape(weight, (BN // 16, 16))[:, :, None], axis=0)


@triton.jit
def three(vector, D: tl.constexpr):
    """A vector of float32 as three bfloat16 columns of a (D, 16) matrix."""
    high = vector.to(HALF)
    rest = vector - high.to(tl.float32)
    mid = rest.to(HALF)
    low = (rest - mid.to(tl.float32)).to(HALF)
    column = tl.arange(0, 16)[None, :]
    zero = tl.zeros((D, 16), HALF)
    m = tl.where(column == 0, high[:, None], zero)
    m = tl.where(column == 1, mid[:, None], m)
    return tl.where(column == 2, low[:, None], m)


@triton.jit(do_not_specialize=["tokens", "tiles", "HEADS"])
def only_read(key, value, out, key_n, tokens, tiles, HEADS, D: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """Keys and values read as `sum_keys` reads them, and hardly anything done."""
    head, split = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, BN)
    total = tl.zeros((BN, D), tl.float32)
    start = split * tiles * BN
    for _ in range(0, tl.minimum(tiles, tl.cdiv(tokens - start, BN))):
        total = tl.maximum(total, tile(key, start, head, row, key_n, tokens, HEADS, D, BN, TMA).to(tl.float32))
        total = tl.maximum(total, tile(value, start, head, row, key_n, tokens, HEADS, D, BN, TMA).to(tl.float32))
        start += BN
    tl.store(out + (split * HEADS + head) * BN + row, tl.max(total, axis=1))


@triton.jit(do_not_specialize=["tokens", "tiles", "HEADS"])
def only_copy(query, out, key_n, tokens, tiles, HEADS, D: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    head, split = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, BN)
    start = split * tiles * BN
    for _ in range(0, tl.minimum(tiles, tl.cdiv(tokens - start, BN))):
        x = tile(query, start, head, row, key_n, tokens, HEADS, D, BN, TMA)
        write(out, start, head, row, tokens, relu(x).to(HALF), HEADS, D, TMA)
        start += BN


@triton.jit(do_not_specialize=["tokens", "tiles", "HEADS"])
def sum_keys(
    key,
    value,
    frame_rows,
    columns,
    matrices,
    vectors,
    key_n,
    tokens,
    tiles,
    COLUMNS: tl.constexpr,
    HEADS,
    D: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
):
    head, split = tl.program_id(0), tl.program_id(1)
    state = tl.zeros((D, D), tl.float32)
    key_sum = tl.zeros((16, D), tl.float32)
    row = tl.arange(0, BN)
    start = split * tiles * BN
    if frame_rows is not None:
        a, b = angles(frame_rows, columns, start, row, tokens, COLUMNS, D)
    for _ in range(0, tl.minimum(tiles, tl.cdiv(tokens - start, BN))):
        k = tile(key, start, head, row, key_n, tokens, HEADS, D, BN, TMA)
        v = tile(value, start, head, row, key_n, tokens, HEADS, D, BN, TMA)
        k = relu(k)
        key_sum += fold(k, BN, D)
        if frame_rows is not None:
            k = turn(k, a, b, False, D, BN)
            a, b = angles(frame_rows, columns, start + BN, row, tokens, COLUMNS, D)
        state = tl.dot(tl.trans(v), k.to(HALF), state)
        start += BN
    part = head * tl.num_programs(1) + split
    d = tl.arange(0, D)
    tl.store(matrices + part * D * D + d[:, None] * D + d[None, :], tl.trans(state))
    tl.store(vectors + part * D + d, tl.sum(key_sum, axis=0))


@triton.jit(do_not_specialize=["tokens", "tiles", "HEADS"])
def read_state(
    query,
    frame_rows,
    columns,
    states,
    key_sums,
    lefts,
    rights,
    out,
    key_n,
    tokens,
    tiles,
    eps,
    COLUMNS: tl.constexpr,
    HEADS,
    D: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    TERMS: tl.constexpr,
    WAY: tl.constexpr,
):
    """WAY 0: sums in registers; 1: divisor by a product; 2: transposed product, queries through shared memory."""
    head = tl.program_id(0)
    row = tl.arange(0, BN)
    d = tl.arange(0, D)
    key_sum = tl.load(key_sums + head * D + d)
    if TERMS == 1:
        left = tl.load(lefts + head * D + d)
        right = tl.load(rights + head * D + d)
    if WAY == 3:
        # Transposed and in 16 bits already: straight to shared memory.
        high = tl.load(states + head * TERMS * D * D + d[:, None] * D + d[None, :])
        if TERMS == 2:
            low = tl.load(states + head * TERMS * D * D + D * D + d[:, None] * D + d[None, :])
    else:
        if WAY == 2:
            state = tl.load(states + head * D * D + d[None, :] * D + d[:, None])
        else:
            state = tl.load(states + head * D * D + d[:, None] * D + d[None, :])
        if TERMS == 1:
            if WAY == 2:
                state -= left[None, :] * right[:, None]
            else:
                state -= left[:, None] * right[None, :]
        high = state.to(HALF)
        low = (state - high.to(tl.float32)).to(HALF)
    if WAY == 1:
        sums = three(key_sum, D)
        if TERMS == 1:
            lefts_ = three(left, D)
    start = tl.program_id(1) * tiles * BN
    if frame_rows is not None:
        a, b = angles(frame_rows, columns, start, row, tokens, COLUMNS, D)
    for _ in range(0, tl.minimum(tiles, tl.cdiv(tokens - start, BN))):
        x = relu(tile(query, start, head, row, key_n, tokens, HEADS, D, BN, TMA))
        q = x.to(HALF)
        if WAY == 1:
            divisor = tl.sum(tl.dot(q, sums), axis=1)
        else:
            divisor = tl.sum(x * key_sum[None, :], axis=1)
        along = divisor
        if frame_rows is not None:
            turned = turn(x, a, b, False, D, BN)
            a, b = angles(frame_rows, columns, start + BN, row, tokens, COLUMNS, D)
            q = turned.to(HALF)
            if TERMS == 1:
                if WAY == 1:
                    along = tl.sum(tl.dot(q, lefts_), axis=1)
                else:
                    along = tl.sum(turned * left[None, :], axis=1)
        scale = 1.0 / (divisor + eps)
        if WAY >= 2:
            t = tl.trans(q)
            o = tl.dot(high, t)
            if TERMS == 2:
                o = tl.dot(low, t, o)
                o *= scale[None, :]
            else:
                o = (o + right[:, None] * along[None, :]) * scale[None, :]
            o = tl.trans(o)
        else:
            o = tl.dot(q, high)
            if TERMS == 2:
                o = tl.dot(q, low, o)
                o *= scale[:, None]
            else:
                o = (o + along[:, None] * right[None, :]) * scale[:, None]
        write(out, start, head, row, tokens, o.to(HALF), HEADS, D, TMA)
        start += BN


@triton.jit(do_not_specialize=["tokens", "tiles", "HEADS"])
def grad_queries(
    gradient,
    query,
    frame_rows,
    columns,
    states,
    key_sums,
    d_query,
    matrices,
    vectors,
    gradient_n,
    key_n,
    tokens,
    tiles,
    eps,
    COLUMNS: tl.constexpr,
    HEADS,
    D: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    TERMS: tl.constexpr,
):
    head, split = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, BN)
    d = tl.arange(0, D)
    state = tl.trans(tl.load(states + head * D * D + d[:, None] * D + d[None, :]))
    key_sum = tl.load(key_sums + head * D + d)
    high = state.to(HALF)
    low = (state - high.to(tl.float32)).to(HALF)
    d_state = tl.zeros((D, D), tl.float32)
    d_key_sum = tl.zeros((16, D), tl.float32)
    start = split * tiles * BN
    if frame_rows is not None:
        a, b = angles(frame_rows, columns, start, row, tokens, COLUMNS, D)
    for _ in range(0, tl.minimum(tiles, tl.cdiv(tokens - start, BN))):
        g = tile(gradient, start, head, row, gradient_n, tokens, HEADS, D, BN, TMA)
        x = relu(tile(query, start, head, row, key_n, tokens, HEADS, D, BN, TMA))
        q = x.to(HALF)
        inverse = 1.0 / (tl.sum(x * key_sum[None, :], axis=1) + eps)
        g = (g.to(tl.float32) * inverse[:, None]).to(HALF)
        n = tl.dot(g, high)
        if TERMS == 2:
            n = tl.dot(g, low, n)
        if frame_rows is not None:
            n = turn(n, a, b, True, D, BN)
            q = turn(x, a, b, False, D, BN).to(HALF)
            a, b = angles(frame_rows, columns, start + BN, row, tokens, COLUMNS, D)
        p = tl.sum(x * n, axis=1)
        d_key_sum -= fold_weighted(p * inverse, x, BN, D)
        n = tl.where(x > 0, n - (p * inverse)[:, None] * key_sum[None, :], 0.0)
        write(d_query, start, head, row, tokens, n.to(HALF), HEADS, D, TMA)
        d_state = tl.dot(tl.trans(g), q, d_state)
        start += BN
    part = head * tl.num_programs(1) + split
    tl.store(matrices + part * D * D + d[:, None] * D + d[None, :], tl.trans(d_state))
    tl.store(vectors + part * D + d, tl.sum(d_key_sum, axis=0))


@triton.jit(do_not_specialize=["tokens", "tiles", "HEADS"])
def grad_keys(
    key,
    value,
    frame_rows,
    columns,
    d_states,
    d_key_sums,
    d_key,
    d_value,
    key_n,
    tokens,
    tiles,
    COLUMNS: tl.constexpr,
    HEADS,
    D: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    TERMS: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.arange(0, BN)
    d = tl.arange(0, D)
    d_state = tl.load(d_states + head * D * D + d[:, None] * D + d[None, :])
    d_key_sum = tl.load(d_key_sums + head * D + d)
    high = d_state.to(HALF)
    low = tl.trans((d_state - high.to(tl.float32)).to(HALF))
    start = tl.program_id(1) * tiles * BN
    if frame_rows is not None:
        a, b = angles(frame_rows, columns, start, row, tokens, COLUMNS, D)
    for _ in range(0, tl.minimum(tiles, tl.cdiv(tokens - start, BN))):
        k = relu(tile(key, start, head, row, key_n, tokens, HEADS, D, BN, TMA))
        v = tile(value, start, head, row, key_n, tokens, HEADS, D, BN, TMA)
        n = tl.dot(v, tl.trans(high))
        if TERMS == 2:
            n = tl.dot(v, low, n)
        t = k.to(HALF)
        if frame_rows is not None:
            n = turn(n, a, b, True, D, BN)
            t = turn(k, a, b, False, D, BN).to(HALF)
            a, b = angles(frame_rows, columns, start + BN, row, tokens, COLUMNS, D)
        n = tl.where(k > 0, n + d_key_sum[None, :], 0.0)
        write(d_key, start, head, row, tokens, n.to(HALF), HEADS, D, TMA)
        write(d_value, start, head, row, tokens, tl.dot(t, high).to(HALF), HEADS, D, TMA)
        start += BN


# ---------------------------------------------------------------------------------------------------------------
import argparse  # noqa: E402
import itertools  # noqa: E402
import math  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

from benchmarks.bandwidth import milliseconds  # noqa: E402
from postgen.kernels.linear_attention import naive  # noqa: E402

D = 128
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def programs(tokens, heads, bn, wanted):
    tiles = triton.cdiv(tokens, bn)
    parts = max(1, min(wanted // heads, 64))
    each = triton.cdiv(tiles, parts)
    return triton.cdiv(tiles, each), each


def described(x, bn, tma):
    if not tma:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x.view(x.shape[0], -1), [bn, D])


class Setting:
    """Inputs at a shape, and what all variants need."""

    def __init__(self, grid, heads, conv=False):
        self.grid, self.heads, self.tokens = grid, heads, math.prod(grid)
        generator = torch.Generator(DEVICE).manual_seed(0)
        pairs = (22, 21, 21)
        axes = [
            torch.outer(torch.arange(n).double(), 1e4 ** -(torch.arange(p) / p).double())
            for n, p in zip(grid, pairs, strict=True)
        ]
        self.terms = naive.Terms(grid=grid, rope=naive.rope_table(*axes).to(DEVICE), rope_pairs=pairs)
        f, r, w = (each.repeat_interleave(1, 0) for each in axes)
        packed = [torch.stack((x.cos(), x.sin()), -1).flatten(1) for x in (f, r, w)]
        fr = torch.cat(
            (packed[0][:, None].expand(-1, grid[1], -1), packed[1][None].expand(grid[0], -1, -1)), -1
        ).reshape(grid[0] * grid[1], -1)
        self.frame_rows = torch.zeros(grid[0] * grid[1], D)
        self.frame_rows[:, : fr.shape[1]] = fr
        self.columns = torch.zeros(grid[2], D)
        self.columns[:, fr.shape[1] :] = packed[2]
        self.frame_rows, self.columns = (x.half().to(DEVICE) for x in (self.frame_rows, self.columns))
        self.make = lambda: self._draw(generator)
        self.sets = []

    def _draw(self, generator):
        fused = torch.randn(self.tokens, 3, self.heads, D, generator=generator, device=DEVICE)
        fused[:, 2] += 0.5
        fused = fused.to(EXACT)
        gradient = torch.randn(self.tokens, self.heads, D, generator=generator, device=DEVICE).to(EXACT)
        q, k, v = fused.unbind(1)
        state = torch.einsum("nhd,nhe->hde", k.float().relu(), v.float())
        key_sum = k.float().relu().sum(0)
        return q, k, v, gradient, state, key_sum

    def rope(self, on):
        return (self.frame_rows, self.columns) if on else (None, None)


def rank_one(state, key_sum, rope):
    right = torch.einsum("hde,hd->he", state, key_sum) / key_sum.square().sum(-1, keepdim=True)
    left = key_sum
    if rope:
        left = torch.einsum("hde,he->hd", state, right) / right.square().sum(-1, keepdim=True)
    return left.contiguous(), right.contiguous()


def in_halves(state, left, right):
    """Transposed states in 16 bits: with one term and the rank one taken out, with two as they are."""
    high = state.to(EXACT)
    both = torch.cat((high.mT, (state - high.float()).to(EXACT).mT), dim=1)
    return {1: (state - left[..., None] * right[:, None]).to(EXACT).mT.contiguous(), 2: both.contiguous()}


def call(s, kind, given, *, rope=False, bn=64, warps=8, stages=2, wanted=264, tma=False, maxnreg=None, **more):
    """Launch one variant; return what it wrote."""
    q, k, v, g, state, key_sum = given
    parts, tiles = programs(s.tokens, s.heads, bn, wanted)
    options = {"num_warps": warps, "num_stages": stages, "HEADS": s.heads, "D": D, "BN": bn, "TMA": tma}
    if maxnreg:
        options["maxnreg"] = maxnreg
    grid = (s.heads, parts)
    dk, dv, dq, dg = (described(x, bn, tma) for x in (k, v, q, g))
    tables, step = s.rope(rope), q.stride(0)
    if kind in ("only_read", "only_copy"):
        if kind == "only_read":
            out = torch.empty(parts * s.heads * bn, device=DEVICE)
            only_read[grid](dk, dv, out, step, s.tokens, tiles, **options)
        else:
            out = torch.empty(s.tokens, s.heads, D, dtype=EXACT, device=DEVICE)
            only_copy[grid](dq, described(out, bn, tma), step, s.tokens, tiles, **options)
        return (out,)
    options["COLUMNS"] = s.grid[2]
    if kind == "keys":
        m = torch.empty(s.heads, parts, D, D, device=DEVICE)
        n = torch.empty(s.heads, parts, D, device=DEVICE)
        sum_keys[grid](dk, dv, *tables, m, n, step, s.tokens, tiles, **options)
        return m, n
    out = torch.empty(s.tokens, s.heads, D, dtype=EXACT, device=DEVICE)
    to = described(out, bn, tma)
    if kind == "queries":
        left, right = more.pop("ranks")
        if more["WAY"] == 3:
            state = more.pop("halves")[more["TERMS"]]
        else:
            more.pop("halves")
        read_state[grid](dq, *tables, state, key_sum, left, right, to, step, s.tokens, tiles, 1e-15, **options, **more)
        return (out,)
    more.pop("ranks")
    more.pop("halves")
    if kind == "grad_queries":
        m = torch.empty(s.heads, parts, D, D, device=DEVICE)
        n = torch.empty(s.heads, parts, D, device=DEVICE)
        grad_queries[grid](
            dg, dq, *tables, state, key_sum, to, m, n, g.stride(0), step, s.tokens, tiles, 1e-15, **options, **more
        )
        return out, m, n
    other = torch.empty_like(out)
    grad_keys[grid](
        dk, dv, *tables, state / s.tokens, key_sum / s.tokens, to, described(other, bn, tma), step, s.tokens, tiles,
        **options, **more,
    )  # fmt: skip
    return out, other


def expected(s, kind, given, rope):
    q, k, v, g, state, key_sum = (x.double() for x in given)
    terms = naive.Terms(
        **({"grid": s.grid, "rope": s.terms.rope.double(), "rope_pairs": s.terms.rope_pairs} if rope else {})
    )
    q, k, v, g = (x[None] for x in (q, k, v, g))
    if kind == "keys":
        k = k.relu()
        return torch.einsum("bmhd,bmhe->hde", naive.rotate(k, terms), v), k.sum((0, 1))
    if kind == "queries":
        x = q.relu()
        z = torch.einsum("bnhd,hd->bnh", x, key_sum)
        return (torch.einsum("bnhd,hde->bnhe", naive.rotate(x, terms), state) / z[..., None],)
    if kind == "grad_queries":
        found = naive.linear_attention_backward(g, None, None, q, k, v, state[None], key_sum[None], terms)
        return found.query, found.state, found.key_sum
    n = naive.rotate(torch.einsum("bmhe,hde->bmhd", v, state / s.tokens), terms, back=True) + key_sum / s.tokens
    x = k.relu()
    return n * (k > 0), torch.einsum("bmhd,hde->bmhe", naive.rotate(x, terms), state / s.tokens)


def error(s, kind, given, found, rope):
    if kind.startswith("only"):
        return 0.0
    found = list(found)
    if kind == "keys":
        found = [x.sum(1) for x in found]
    if kind == "grad_queries":
        found[1:] = [x.sum(1) for x in found[1:]]
    want = expected(s, kind, given, rope)
    return max(float((x.double() - y.reshape(x.shape)).norm() / y.norm()) for x, y in zip(found, want, strict=True))


def variants():
    yield {"kind": "only_read", "bn": 64, "warps": 8, "wanted": 528}
    yield {"kind": "only_copy", "bn": 64, "warps": 8, "wanted": 528}
    for rope in (False, True):
        for bn, stages, tma, reg in (
            (32, 3, False, 128),
            (64, 3, False, 128),
            (64, 2, False, 128),
            (64, 3, True, None),
            (32, 4, True, 128),
            (64, 2, False, None),
        ):
            for wanted in (264, 528) if not rope else (528,):
                yield {
                    "kind": "keys",
                    "rope": rope,
                    "bn": bn,
                    "stages": stages,
                    "tma": tma,
                    "maxnreg": reg,
                    "wanted": wanted,
                }
    for rope, terms, tma, (warps, stages, bn), wanted in (
        *itertools.product((False,), (1, 2), (False, True), ((8, 2, 64), (8, 3, 64), (4, 2, 64)), (528,)),
        *itertools.product((True,), (1, 2), (False, True), ((8, 2, 64), (8, 1, 64)), (528,)),
        *itertools.product((False, True), (2,), (False,), ((8, 2, 64),), (264, 1056)),
    ):
        yield {
            "kind": "queries",
            "rope": rope,
            "WAY": 3,
            "TERMS": terms,
            "tma": tma,
            "warps": warps,
            "stages": stages,
            "bn": bn,
            "wanted": wanted,
        }
    for terms, tma in ((2, True), (1, True), (2, False)):
        yield {
            "kind": "queries",
            "WAY": 1,
            "TERMS": terms,
            "tma": tma,
            "warps": 4,
            "stages": 2,
            "bn": 64,
            "wanted": 528,
        }
    for terms, tma, bn, stages, wanted in (
        (1, False, 64, 2, 528),
        (1, False, 64, 2, 264),
        (1, True, 64, 2, 528),
        (1, False, 32, 3, 528),
        (2, False, 32, 3, 528),
        (2, False, 64, 2, 528),
    ):
        yield {"kind": "grad_queries", "TERMS": terms, "tma": tma, "bn": bn, "stages": stages, "wanted": wanted}
    for terms, tma, bn, stages, warps, wanted in (
        (1, False, 64, 2, 8, 528),
        (1, True, 64, 2, 8, 528),
        (1, True, 64, 2, 4, 528),
        (2, True, 64, 2, 8, 528),
        (2, False, 64, 2, 8, 528),
        (2, True, 64, 2, 4, 528),
    ):
        yield {
            "kind": "grad_keys",
            "TERMS": terms,
            "tma": tma,
            "bn": bn,
            "stages": stages,
            "warps": warps,
            "wanted": wanted,
        }
    for kind, terms, bn in (
        ("grad_queries", 1, 64),
        ("grad_queries", 2, 32),
        ("grad_keys", 1, 64),
        ("grad_keys", 2, 64),
    ):
        yield {"kind": kind, "rope": True, "TERMS": terms, "tma": False, "bn": bn, "stages": 2, "wanted": 528}


def convolutions():
    for stacked, tokens, strip, warps, stages, programs_, reserved in (
        (True, 32, 8, 8, 3, 0, 30), (False, 32, 8, 8, 3, 0, 30), (False, 16, 8, 4, 3, 264, 45), (False, 16, 8, 4, 3, 264, 75),
        (True, 16, 8, 4, 3, 264, 75), (False, 16, 8, 4, 2, 264, 45), (False, 32, 4, 16, 3, 0, 30), (False, 16, 4, 8, 3, 0, 30),
    ):  # fmt: skip
        yield {"stacked": stacked, "tokens": tokens, "strip": strip, "warps": warps, "stages": stages,
               "programs": programs_, "reserved": reserved}  # fmt: skip


def convolve(s, given, how, filters):
    """Launch the candidate of the pass with a convolution."""
    from benchmarks import linear_variants_conv as candidate
    from postgen.kernels.linear_attention import triton as host
    from postgen.kernels.linear_attention import triton_launch

    q, k, v, _, state, key_sum = given
    left, right = rank_one(state, key_sum, False)
    if how["stacked"]:
        high = state.to(EXACT)
        matrix = torch.cat((high, (state - high.float()).to(EXACT)), dim=2).transpose(1, 2).contiguous()
    else:
        matrix = (state - left[..., None] * right[:, None]).to(EXACT).transpose(1, 2).contiguous()
    matrix = matrix if DEVICE == "cuda" else matrix.float()
    launch = triton_launch.Launch(**how)
    terms = naive.Terms(grid=s.grid, conv_space=filters[0], conv_time=filters[1])
    x, query = v[None], q[None]
    shared = triton_launch.constants(x, launch, terms)
    share = triton_launch.strips(s.grid, s.heads, launch)
    space, time_ = host.taps(terms)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def go(q, v):
        x, query = v[None], q[None]
        kernel = candidate.convolve_rows[(share.programs,)](
            x, query, None, None, None, None, space, time_, matrix, right, key_sum, out,
            x.stride(0), x.stride(2), s.tokens // s.grid[0] * x.stride(1), *query.stride(), 0, s.heads and D,
            *share[:-1], 1e-6, 1e-15,
            SIGN=1, SPACE=5, TIME=3, TAPS=space.shape[1], HEADS=s.heads, STRIP=launch.strip, X_N=x.stride(1), X_D=1,
            BLOCK_E=D, STACKED=launch.stacked, **shared,
        )  # fmt: skip
        host.reserve(kernel, launch.reserved)
        return out

    return go


def filters_of(s):
    generator = torch.Generator(DEVICE).manual_seed(1)
    width = s.heads * D
    return (
        torch.randn(width, 5, 5, generator=generator, device=DEVICE) / 5,
        torch.randn(width, 3, generator=generator, device=DEVICE),
    )


def check(part):
    """Compile a part of the variants at a small size, whose constants are those of the large one."""
    first, step = map(int, part.split("/"))
    s = Setting((2, 3, 80) if DEVICE == "cuda" else (2, 2, 9), 40 if DEVICE == "cuda" else 1)
    given = s.make()
    ranks = {on: rank_one(given[4], given[5], on) for on in (False, True)}
    halves = {on: in_halves(given[4], *ranks[on]) for on in (False, True)}
    every = [*convolutions(), *variants()]
    for which in range(first, len(every), step):
        v = every[which]
        try:
            if "kind" not in v:
                # Its grid is a constant of the kernel: the walk is short, the frames are not.
                whole = Setting((21, 45, 80), 40)
                whole.tokens = 21 * 45 * 80
                shape = (whole.tokens, 3, 40, D)
                q, k, x = torch.empty(shape, dtype=EXACT, device=DEVICE).unbind(1)
                convolve(whole, (q, k, x, None, given[4], given[5]), v, filters_of(whole))(q, x)
                torch.cuda.synchronize()
                continue
            more = (
                {}
                if v["kind"].startswith(("only", "keys"))
                else {"ranks": ranks[v.get("rope", False)], "halves": halves[v.get("rope", False)]}
            )
            call(s, given=given, **more, **v)
        except Exception as e:  # noqa: BLE001
            print(f"FAILED {v}: {type(e).__name__} {str(e)[-300:]!r}", flush=True)


def conv_check(s, given):
    space, time_ = filters_of(s)
    q, k, v, _, state, key_sum = given
    x = q.double().relu()
    want = torch.einsum("nhd,hde->nhe", x, state.double())
    want = want / torch.einsum("nhd,hd->nh", x, key_sum.double())[..., None]
    terms = naive.Terms(grid=s.grid, conv_space=space.double(), conv_time=time_.double())
    want = want + naive.convolve(v.double()[None], terms)[0]
    from postgen.kernels.linear_attention import triton as host

    float_terms = naive.Terms(grid=s.grid, conv_space=space, conv_time=time_)
    found = host._grad_filters(q[None], v[None], float_terms)
    exact = naive.convolve_backward(q[None].double(), v[None].double(), terms)[1:]
    for x, y in zip(found, exact, strict=True):
        print(f"check {float((x.double() - y).norm() / y.norm()):.2e} grad_filters", flush=True)
    for how in convolutions():
        try:
            out = convolve(s, given, how, (space, time_))(q, v)[0]
            print(f"check {float((out.double() - want).norm() / want.norm()):.2e} convolution {how}", flush=True)
        except Exception as e:  # noqa: BLE001
            print(f"check FAILED convolution {how}: {type(e).__name__} {str(e)[-300:]!r}", flush=True)


def present(s, sets):
    """The passes as they are."""
    from dataclasses import replace

    from benchmarks.linear_launches import passes
    from postgen.kernels.linear_attention import triton as host
    from postgen.kernels.linear_attention import triton_launch as host_launch

    space, time_ = filters_of(s)
    plain = naive.Terms()
    for label, terms in (
        ("plain", plain), ("rope", s.terms), ("conv", replace(plain, grid=s.grid, conv_space=space, conv_time=time_)),
    ):  # fmt: skip
        for name, function in passes(terms).items():
            given = [
                (q[None], k[None], v[None], host.Sums(state[None], key_sum[None]))
                for q, k, v, _, state, key_sum in sets
            ]
            yield f"present {label} {name}", function, given
    yield (
        "present conv grad_filters",
        lambda q, k, v, sums: host._grad_filters(q, v, replace(plain, grid=s.grid, conv_space=space, conv_time=time_)),
        given,
    )
    from postgen.kernels.linear_attention.triton_backward import grad_filters

    def old(q, k, v, sums):
        g, value = q, v
        parts, tiles = programs(s.tokens, s.heads, 64, 528)
        filters = torch.empty(1, parts, 28, s.heads, D, device=DEVICE)
        grad_filters[(28, s.heads * parts, 1)](
            g, value, None, filters, *g.stride(), *value.stride(), s.heads, s.tokens, tiles, SPACE=5, TIME=3,
            ROWS=s.grid[1], COLUMNS=s.grid[2], CHANNELS=D, BLOCK_N=64, BLOCK_D=D, num_warps=4, num_stages=1,
        )  # fmt: skip
        return filters.sum(dim=(0, 1))

    yield "old conv grad_filters", old, given
    for tokens, strip, warps, programs_ in ((32, 8, 8, 132), (16, 8, 4, 264), (16, 4, 8, 132), (16, 8, 4, 792)):

        def launched(
            q,
            k,
            v,
            sums,
            how=host_launch.Launch(tokens=tokens, strip=strip, warps=warps, stages=1, programs=programs_),
        ):
            kept = host_launch.LAUNCHES["grad_filters", 128]
            host_launch.LAUNCHES["grad_filters", 128] = how
            try:
                return host._grad_filters(q, v, replace(plain, grid=s.grid, conv_space=space, conv_time=time_))
            finally:
                host_launch.LAUNCHES["grad_filters", 128] = kept

        yield f"new grad_filters {tokens} {strip} {warps} {programs_}", launched, given
    yield (
        "present conv of gradient",
        lambda q, k, v, sums: host._convolve(
            q, None, sums, replace(plain, grid=s.grid, conv_space=space, conv_time=time_)
        ),
        given,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--small", action="store_true", help="1.3B at 480p, only what does not compile anew")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if options.check:
        return check(options.check)
    begun = time.time()
    s = Setting((21, 30, 52), 12) if options.small else Setting((21, 45, 80), 40)
    if options.profile:
        given = s.make()
        for name, function, sets in present(s, [given]):
            function(*sets[0])
            torch.cuda.synchronize()
            if name.startswith("new"):
                continue
            print(name, flush=True)
            torch.cuda.cudart().cudaProfilerStart()
            function(*sets[0])
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
        return None
    if not options.small:
        words = [sys.executable, "-m", "benchmarks.linear_variants", "--check"]
        for process in [subprocess.Popen([*words, f"{i}/{options.workers}"]) for i in range(options.workers)]:
            process.wait()
        print(f"checked after {time.time() - begun:.0f} s", flush=True)
    sets = [s.make() for _ in range(3)]
    unit = 2 * s.tokens * s.heads * D / 4.2e9
    torch.cuda.synchronize()
    for name, function, given in present(s, sets):
        if not options.small and name.startswith(("present plain", "present rope", "old")):
            continue
        print(f"{milliseconds(function, given):.4f} ms  {name}", flush=True)
    print(f"present after {time.time() - begun:.0f} s", flush=True)
    ranks = {on: rank_one(sets[0][4], sets[0][5], on) for on in (False, True)}
    halves = {on: in_halves(sets[0][4], *ranks[on]) for on in (False, True)}
    tensors = {"only_read": 2, "only_copy": 2, "keys": 2, "queries": 2, "grad_queries": 3, "grad_keys": 4}
    for v in variants():
        if options.small and (v.get("rope") or v["kind"].startswith("grad")):
            continue
        more = (
            {}
            if v["kind"].startswith(("only", "keys"))
            else {"ranks": ranks[v.get("rope", False)], "halves": halves[v.get("rope", False)]}
        )
        try:
            ms = milliseconds(lambda *given, v=v, more=more: call(s, given=given, **more, **v), sets)
            floor = tensors[v["kind"]] * unit
            print(f"{ms:.4f} ms  {ms / floor:.3f} of floor  {v}", flush=True)
        except Exception as e:  # noqa: BLE001
            print(f"FAILED {v}: {type(e).__name__} {str(e)[-200:]!r}", flush=True)
    if not options.small:
        filters = filters_of(s)
        for how in convolutions():
            try:
                go = convolve(s, sets[0], how, filters)
                ms = milliseconds(go, [(each[0], each[2]) for each in sets])
                print(f"{ms:.4f} ms  {ms / (3 * unit):.3f} of floor  convolution {how}", flush=True)
            except Exception as e:  # noqa: BLE001
                print(f"FAILED convolution {how}: {type(e).__name__} {str(e)[-200:]!r}", flush=True)
    print(f"done after {time.time() - begun:.0f} s", flush=True)
    return None


if __name__ == "__main__":
    sys.exit(main())
