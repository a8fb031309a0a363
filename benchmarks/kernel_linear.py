"""Linear attention in `python -m benchmarks.kernels`: the cases of a shape, diffusers' code, and the gates."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gates import gate, largest, smallest
from postgen.kernels.linear_attention import naive, ops
from postgen.kernels.linear_attention.naive import Terms

ROWS = {1560: 30, 3600: 45, 1350: 30, 384: 16, 4: 2}
"""The number of tokens per frame -> the rows of the token grid."""
LARGE = "Wan 14B 720p 81f"
"""The slowest shape of Wan, which has gates of its own."""
COMPARED_HEADS = 2
"""The number of heads whose error is computed; all heads in float64 would not fit into memory."""


class Tokens(Protocol):
    """The size of a clip: latent frames, tokens per frame (`places`), heads and channels per head."""

    name: str
    frames: int
    places: int
    heads: int
    channels: int


def cases(shape: Any, device: str = "cuda") -> list[dict[str, Any]]:
    """Return the fields of `benchmarks.kernels.Case` for every case of a shape."""
    return [
        forward(shape, "linear_attention", device),
        forward(shape, "linear_attention + rope", device),
        forward(shape, "linear_attention + convolution", device),
        backward(shape, device),
    ]


def gates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the gates of the worst shape and those of Wan 14B at 720p."""
    plain, turned, conv, back = (
        [row for row in rows if row["op"] == op]
        for op in (
            "linear_attention",
            "linear_attention + rope",
            "linear_attention + convolution",
            "linear_attention backward",
        )
    )
    limits = {"fwd": (plain, 1.35), "fwd_rope": (turned, 1.6), "fwd_conv": (conv, 1.6), "bwd": (back, 1.7)}
    found = []
    for name, (timed, most) in limits.items():
        large = [row for row in timed if row.get("shape") == LARGE]
        found.append(gate(f"linear_{name}_over_floor", largest(timed, "over_floor"), "<=", most))
        found.append(gate(f"linear_{name}_over_floor_14b_720p", largest(large, "over_floor"), "<=", most))
    return [
        *found,
        gate("linear_vs_sana_eager", smallest(plain, "vs_sana"), ">=", 10),
        gate("linear_vs_compiled_fp32_naive", smallest(plain, "vs_compiled"), ">=", 2.5),
        gate("linear_relative_error", largest(plain + turned + conv, "relative_error"), "<=", 4e-3),
    ]


def forward(shape: Tokens, op: str, device: str) -> dict[str, Any]:
    """Return the case of a forward pass over views of a fused projection; a convolution reads the values again."""
    terms = _terms(shape, op, shape.heads, device)
    compared = _terms(shape, op, min(COMPARED_HEADS, shape.heads), device)
    given = {field.name: getattr(terms, field.name) for field in fields(terms)}
    peer = {"linear_attention": sana, "linear_attention + rope": partial(sana_video, rope=_full_tables(terms))}
    return {
        "op": op,
        "shape": shape.name,
        "moved_bytes": (5 if terms.conv_space is not None else 4) * _tensor_bytes(shape),
        "make": partial(_projection, shape, device),
        "ours": partial(ops.linear_attention, **given),
        "eager": lambda q, k, v: naive.linear_attention(q, k, v, terms)[0],
        "exact": lambda q, k, v: naive.linear_attention(q, k, v, _in_float64(compared))[0],
        "compared": partial(_few_heads, shape),
        "peers": {"sana": peer[op]} if op in peer else {},
    }


def backward(shape: Tokens, device: str) -> dict[str, Any]:
    """Return the case of the gradients of queries, keys and values, which moves seven tensors."""
    terms = Terms()

    def make() -> tuple[Tensor, ...]:
        query, key, value = _projection(shape, device)
        _, state, key_sum = ops.linear_attention_with_state(query, key, value)
        return torch.randn(query.shape, device=device).to(query.dtype), query, key, value, state, key_sum

    def ours(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        settings = ("relu", "", [terms.eps, terms.norm_eps], [], [])
        found = ops.linear_attention_backward(gradient, None, None, *sums, query, key, value, *[None] * 6, *settings)
        return tuple(found[:3])

    def formula(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        found = naive.linear_attention_backward(gradient, None, None, query, key, value, *sums, terms)
        return found.query, found.key, found.value

    return {
        "op": "linear_attention backward",
        "shape": shape.name,
        "moved_bytes": 7 * _tensor_bytes(shape),
        "make": make,
        "ours": ours,
        "eager": formula,
        "exact": formula,
        "compared": partial(_few_heads, shape),
    }


def sana(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute as diffusers' SanaLinearAttnProcessor2_0 does between its projections."""
    query, key, value = (x.flatten(2).transpose(1, 2).unflatten(1, x.shape[2:]) for x in (query, key, value))
    dtype = value.dtype
    query, key, value = F.relu(query).float(), F.relu(key.transpose(2, 3)).float(), value.float()
    value = F.pad(value, (0, 0, 0, 1), mode="constant", value=1.0)
    out = torch.matmul(torch.matmul(value, key), query)
    out = out[:, :, :-1] / (out[:, :, -1:] + 1e-15)
    return out.flatten(1, 2).transpose(1, 2).to(dtype).unflatten(2, (query.shape[1], -1))


def sana_video(query: Tensor, key: Tensor, value: Tensor, *, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Compute as diffusers' SanaLinearAttnProcessor3_0 does between its norms and its last projection."""
    assert rope is not None
    cosine, sine = rope
    dtype = value.dtype

    def rotate(x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(x)
        out[..., 0::2] = even * cosine - odd * sine
        out[..., 1::2] = even * sine + odd * cosine
        return out.type_as(x)

    query, key = F.relu(query), F.relu(key)
    turned_query, turned_key = (rotate(x).permute(0, 2, 3, 1).float() for x in (query, key))
    query, key, value = query.permute(0, 2, 3, 1), key.permute(0, 2, 3, 1), value.permute(0, 2, 3, 1).float()
    divisor = key.sum(dim=-1, keepdim=True).transpose(-2, -1) @ query + 1e-15
    out = torch.matmul(torch.matmul(value, turned_key.transpose(-1, -2)), turned_query) * (1 / divisor)
    return out.flatten(1, 2).transpose(1, 2).to(dtype).unflatten(2, (query.shape[1], -1))


def _projection(shape: Tokens, device: str) -> tuple[Tensor, Tensor, Tensor]:
    size = (1, shape.frames * shape.places, 3, shape.heads, shape.channels)
    query, key, value = torch.randn(size, dtype=torch.bfloat16, device=device).unbind(dim=2)
    return query, key, value


def _terms(shape: Tokens, op: str, heads: int, device: str) -> Terms:
    rows = ROWS[shape.places]
    grid = (shape.frames, rows, shape.places // rows)
    generator = torch.Generator(device).manual_seed(0)
    if op.endswith("rope"):
        pairs = shape.channels // 6
        rope_pairs = (shape.channels // 2 - 2 * pairs, pairs, pairs)
        angles = [
            torch.outer(torch.arange(length, dtype=torch.float64), 1e4 ** -(torch.arange(count) / count).double())
            for length, count in zip(grid, rope_pairs, strict=True)
        ]
        return Terms(grid=grid, rope=naive.rope_table(*angles).to(device), rope_pairs=rope_pairs)
    if op.endswith("convolution"):
        # The numbers are drawn for all heads, so that a case with fewer heads has the same weights.
        space = torch.randn(shape.heads * shape.channels, 5, 5, generator=generator, device=device) / 5
        time = torch.randn(shape.heads * shape.channels, 3, generator=generator, device=device)
        few = heads * shape.channels
        return Terms(grid=grid, conv_space=space[:few].contiguous(), conv_time=time[:few].contiguous())
    return Terms()


def _full_tables(terms: Terms) -> tuple[Tensor, Tensor] | None:
    """Return the cosines and sines of every token, (N, 1, D / 2), as diffusers computes them."""
    if terms.rope is None:
        return None
    assert terms.grid is not None
    tokens = terms.grid[0] * terms.grid[1] * terms.grid[2]
    one = torch.zeros(1, tokens, 1, 2 * terms.rope.shape[1], device=terms.rope.device)
    one[..., 0::2] = 1
    turned = naive.rotate(one, terms)[0]
    return turned[..., 0::2], turned[..., 1::2]


def _few_heads(shape: Tokens, x: Tensor) -> Tensor:
    return x[:, :, :COMPARED_HEADS] if x.shape[1] == shape.frames * shape.places else x[:, :COMPARED_HEADS]


def _in_float64(terms: Terms) -> Terms:
    given = {field.name: getattr(terms, field.name) for field in fields(terms)}
    return replace(terms, **{name: x.double() for name, x in given.items() if isinstance(x, Tensor)})


def _tensor_bytes(shape: Tokens) -> int:
    return 2 * shape.frames * shape.places * shape.heads * shape.channels
