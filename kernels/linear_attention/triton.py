"""Linear attention as GPU kernels: two passes over memory, keys and values first, then queries and results.

Here is what is launched, and in what shape; `triton_launch.py` says how the tokens are cut. The kernels are in
`triton_forward.py`, `triton_backward.py` and, for a second pass with a convolution, `triton_convolution.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from postgen.kernels.dispatch import launching_on
from postgen.kernels.linear_attention.naive import Gradients, Terms
from postgen.kernels.linear_attention.triton_backward import grad_keys, grad_queries
from postgen.kernels.linear_attention.triton_cache import reserve
from postgen.kernels.linear_attention.triton_convolution import convolve_rows
from postgen.kernels.linear_attention.triton_filters import sum_filters
from postgen.kernels.linear_attention.triton_forward import join_splits, read_state, sum_keys, token_rstd
from postgen.kernels.linear_attention.triton_launch import block_d, constants, launch, splits, strips

_JOINED = 2048
"""Numbers that a program of `join_splits` holds."""


def linear_attention(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `naive.linear_attention`; `ops.py` has checked the shapes. Any strides, nothing is copied."""
    with launching_on(query):
        sums = _sum_keys(key, value, terms)
        out = _convolve(value, query, sums, terms) if convolves(terms) else _read_state(query, sums, terms)
    return out, sums.matrix, sums.vector


def linear_attention_backward(
    gradient: Tensor,
    of_state: Tensor | None,
    of_key_sum: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    key_sum: Tensor,
    terms: Terms,
) -> Gradients:
    """Compute `naive.linear_attention_backward`; the gradients of normed queries and keys are float32."""
    with launching_on(query):
        of_query, sums = _grad_queries(gradient, query, Sums(state, key_sum), (of_state, of_key_sum), terms)
        of_key, of_value = _grad_keys(gradient, key, value, sums, terms)
        of_space, of_time = _grad_filters(gradient, value, terms)
    return Gradients(
        query=of_query,
        key=of_key,
        value=of_value,
        conv_space=of_space,
        conv_time=of_time,
        state=sums.matrix,
        key_sum=sums.vector,
    )


class Sums(NamedTuple):
    """A sum over tokens, of outer products and of vectors."""

    matrix: Tensor
    """(B, H, D, D)."""
    vector: Tensor
    """(B, H, D)."""


def head_stride(weight: Tensor | None, channels: int) -> int:
    """Return how far apart the weights of two heads lie: 0 if heads share them."""
    return 0 if weight is None or weight.shape[-1] == channels else channels


def rstd(x: Tensor, terms: Terms) -> Tensor | None:
    """Return 1 / RMS of every token over all heads, (B, N), where the norm is that."""
    if terms.qk_norm != "rms_norm_across_heads":
        return None
    batch, tokens, heads, channels = x.shape
    found = torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    token_rstd[(tokens, batch)](
        x,
        found,
        *x.stride(),
        terms.norm_eps,
        HEADS=heads,
        CHANNELS=channels,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_D=block_d(channels),
        num_warps=4,
    )
    return found


def convolves(terms: Terms) -> bool:
    """Say whether there is a convolution."""
    return terms.conv_space is not None or terms.conv_time is not None


def taps(terms: Terms) -> list[Tensor | None]:
    """Return the weights of both convolutions tap by tap in float32."""
    weights = (terms.conv_space, terms.conv_time)
    return [None if weight is None else weight.float().flatten(1).t().contiguous() for weight in weights]


def join(parts: Sums, *first: Tensor | None) -> Sums:
    """Add up the splits of a sum, (B, H, splits, ..) float32, and what it starts from."""
    batch, heads, splits, channels = parts.vector.shape
    joined = Sums(
        parts.matrix.new_empty(batch, heads, channels, channels), parts.vector.new_empty(batch, heads, channels)
    )
    block_s, width = triton.next_power_of_2(splits), block_d(channels)
    block_r = max(1, _JOINED // (block_s * width))
    join_splits[(triton.cdiv(channels, block_r), batch * heads)](
        *parts,
        *(contiguous(each) for each in first),
        *joined,
        splits,
        CHANNELS=channels,
        BLOCK_S=block_s,
        BLOCK_R=block_r,
        BLOCK_D=width,
        num_warps=4,
    )
    return joined


def partial_sums(x: Tensor, parts: int) -> Sums:
    """Return room for the sums of every split."""
    batch, _, heads, channels = x.shape
    matrices = torch.empty(batch, heads, parts, channels, channels, dtype=torch.float32, device=x.device)
    return Sums(matrices, matrices.new_empty(batch, heads, parts, channels))


def _sum_keys(key: Tensor, value: Tensor, terms: Terms) -> Sums:
    batch, tokens, heads, channels = key.shape
    how = launch("keys" if terms.rope is None else "turned_keys", key)
    parts, tiles = splits(tokens, heads, how)
    found = partial_sums(key, parts)
    sum_keys[(heads, parts, batch)](
        key,
        value,
        rstd(key, terms),
        contiguous(terms.key_weight),
        contiguous(terms.rope),
        contiguous(terms.key_lengths),
        *found,
        *key.stride(),
        *value.stride(),
        head_stride(terms.key_weight, channels),
        tokens,
        tiles,
        terms.norm_eps,
        **constants(key, how, terms),
    )
    return join(found, terms.state, terms.key_sum)


def _read_state(query: Tensor, sums: Sums, terms: Terms) -> Tensor:
    batch, tokens, heads, channels = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    how = launch("queries" if terms.rope is None else "turned_queries", query)
    parts, tiles = splits(tokens, heads, how)
    read_state[(heads, parts, batch)](
        query,
        rstd(query, terms),
        contiguous(terms.query_weight),
        contiguous(terms.rope),
        *sums,
        out,
        *query.stride(),
        head_stride(terms.query_weight, channels),
        tokens,
        tiles,
        terms.norm_eps,
        terms.eps,
        **constants(query, how, terms),
    )
    return out


def _convolve(x: Tensor, query: Tensor | None, sums: Sums, terms: Terms) -> Tensor:
    """Return the convolutions of the values and the attention of the queries; without queries, transposes of x."""
    batch, tokens, heads, channels = x.shape
    assert terms.grid is not None
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    how = launch("convolution", x)
    shared = constants(x, how, terms)
    width = min(how.channels, shared["BLOCK_D"])
    parts = shared["BLOCK_D"] // width
    share = strips(terms.grid, batch * heads * parts, how)
    space, time = taps(terms)
    some = space if space is not None else time
    assert some is not None
    side = sides(terms)
    kernel = convolve_rows[(share.programs,)](
        x,
        query,
        None if query is None else rstd(query, terms),
        contiguous(terms.query_weight),
        contiguous(terms.rope),
        None if query is None else contiguous(terms.key_lengths),
        space,
        time,
        *sums,
        out,
        x.stride(0),
        x.stride(2),
        tokens // terms.grid[0] * x.stride(1),
        *(x if query is None else query).stride(),
        head_stride(terms.query_weight, channels),
        head_stride(some, channels),
        *share[:-1],
        terms.norm_eps,
        terms.eps,
        SIGN=-1 if query is None else 1,
        SPACE=max(side["SPACE"], 1),
        TIME=side["TIME"],
        TAPS=some.shape[1],
        HEADS=heads,
        STRIP=how.strip,
        X_N=x.stride(1),
        X_D=x.stride(3),
        BLOCK_E=width,
        STACKED=how.stacked,
        **shared,
    )
    reserve(kernel, how.reserved)
    return out


def _grad_queries(
    gradient: Tensor, query: Tensor, given: Sums, first: tuple[Tensor | None, Tensor | None], terms: Terms
) -> tuple[Tensor, Sums]:
    batch, tokens, heads, channels = query.shape
    of_query = _new_gradient(query, terms)
    how = launch("grad_queries", query)
    parts, tiles = splits(tokens, heads, how)
    found = partial_sums(query, parts)
    grad_queries[(heads, parts, batch)](
        gradient,
        query,
        rstd(query, terms),
        contiguous(terms.query_weight),
        contiguous(terms.rope),
        *(contiguous(each) for each in given),
        of_query,
        *found,
        *gradient.stride(),
        *query.stride(),
        head_stride(terms.query_weight, channels),
        tokens,
        tiles,
        terms.norm_eps,
        terms.eps,
        **constants(query, how, terms),
    )
    return of_query, join(found, *first)


def _grad_keys(gradient: Tensor, key: Tensor, value: Tensor, sums: Sums, terms: Terms) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, channels = key.shape
    of_key = _new_gradient(key, terms)
    adds = convolves(terms)
    of_value = (
        _convolve(gradient, None, sums, terms)
        if adds
        else torch.empty(value.shape, dtype=value.dtype, device=value.device)
    )
    how = launch("grad_keys" if terms.rope is None else "turned_grad_keys", key)
    parts, tiles = splits(tokens, heads, how)
    grad_keys[(heads, parts, batch)](
        key,
        value,
        rstd(key, terms),
        contiguous(terms.key_weight),
        contiguous(terms.rope),
        contiguous(terms.key_lengths),
        *sums,
        of_key,
        of_value,
        *key.stride(),
        *value.stride(),
        head_stride(terms.key_weight, channels),
        tokens,
        tiles,
        terms.norm_eps,
        ADDS=adds,
        **constants(key, how, terms),
    )
    return of_key, of_value


def _grad_filters(gradient: Tensor, value: Tensor, terms: Terms) -> tuple[Tensor | None, Tensor | None]:
    if not convolves(terms):
        return None, None
    assert terms.grid is not None
    batch, tokens, heads, channels = value.shape
    how = launch("grad_filters", value)
    shared = constants(value, how, terms)
    width = min(how.channels, shared["BLOCK_D"])
    share = strips(terms.grid, batch * heads * (shared["BLOCK_D"] // width), how, whole=False)
    side = sides(terms)
    space = max(side["SPACE"], 1)
    found = torch.empty(
        batch, share.blocks * share.bands, space**2 + side["TIME"], heads, channels,
        dtype=torch.float32, device=value.device,
    )  # fmt: skip
    names = ("FRAMES", "ROWS", "COLUMNS", "CHANNELS", "BLOCK_N", "BLOCK_D", "num_warps", "num_stages")
    sum_filters[(share.programs,)](
        gradient,
        value,
        contiguous(terms.key_lengths),
        found,
        *gradient.stride(),
        value.stride(0),
        value.stride(2),
        tokens // terms.grid[0] * value.stride(1),
        share.blocks,
        share.bands,
        share.band,
        SPACE=space,
        TIME=side["TIME"],
        HEADS=heads,
        STRIP=how.strip,
        X_N=value.stride(1),
        X_D=value.stride(3),
        BLOCK_E=width,
        **{name: shared[name] for name in names},
    )
    by_tap = found.sum(dim=(0, 1)).flatten(1)
    return _filter(by_tap[: space**2], terms.conv_space), _filter(by_tap[space**2 :], terms.conv_time)


def sides(terms: Terms) -> dict[str, int]:
    """Return the taps along a side of each convolution, 0 where there is none."""
    return {
        "SPACE": 0 if terms.conv_space is None else terms.conv_space.shape[-1],
        "TIME": 0 if terms.conv_time is None else terms.conv_time.shape[-1],
    }


def _filter(by_tap: Tensor, weight: Tensor | None) -> Tensor | None:
    """Bring (taps, H * D) to the shape of the weight, adding up heads that share it."""
    return None if weight is None else by_tap.t().reshape(-1, *weight.shape).sum(dim=0).to(weight.dtype)


def _new_gradient(x: Tensor, terms: Terms) -> Tensor:
    """Return room for a gradient, in float32 where that of a norm follows."""
    return torch.empty(x.shape, dtype=x.dtype if terms.qk_norm is None else torch.float32, device=x.device)


def contiguous(x: Tensor | None) -> Tensor | None:
    """Return a small tensor without gaps."""
    return None if x is None else x.contiguous()
