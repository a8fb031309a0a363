"""Launches of the kernels that go down the rows of frames: the convolutions, and the gradient of their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postgen.kernels.linear_attention.naive import Terms, by_kind
from postgen.kernels.linear_attention.triton_cache import reserve
from postgen.kernels.linear_attention.triton_convolution import convolve_rows
from postgen.kernels.linear_attention.triton_filters import sum_filters
from postgen.kernels.linear_attention.triton_launch import constants, launch, strips
from postgen.kernels.linear_attention.triton_sums import Sums, contiguous, head_stride, rstd


def convolves(terms: Terms) -> bool:
    """Whether there is a convolution."""
    return terms.conv_space is not None or terms.conv_time is not None


def convolve(
    x: Tensor, query: Tensor | None, sums: Sums | None, terms: Terms, table: Tensor | None, out: Tensor
) -> None:
    """Write to `out` the convolutions of the video tokens x plus the attention of their queries.

    Without queries, write the transposed convolutions of x.
    """
    batch, tokens, heads, channels = x.shape
    assert terms.grid is not None
    how = launch("convolution", x)
    shared = constants(x, how, terms)
    width = shared["BLOCK_E"] = min(how.channels, shared["BLOCK_E"])
    share = strips(terms.grid, batch * heads * (shared["BLOCK_D"] // width), how)
    space, time = taps(terms)
    some = space if space is not None else time
    assert some is not None
    side = sides(terms)
    kernel = convolve_rows[(share.programs,)](
        x,
        query,
        None if query is None else rstd(query, terms),
        contiguous(terms.query_weight),
        table,
        None if query is None else video_lengths(terms),
        space,
        time,
        None if sums is None else sums.terms,
        None if sums is None else sums.vector,
        out,
        x.stride(0),
        x.stride(2),
        tokens // terms.grid[0] * x.stride(1),
        *(x if query is None else query).stride(),
        out.stride(0),
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
        STACKED=how.stacked,
        **without(shared, "TEXT"),
    )
    reserve(kernel, how.reserved)


def grad_filters(gradient: Tensor, value: Tensor, terms: Terms) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of both convolutions' weights for a gradient of the results; None without weights."""
    if not convolves(terms):
        return None, None
    assert terms.grid is not None
    gradient, value = by_kind(gradient, terms)[1], by_kind(value, terms)[1]
    batch, tokens, heads, channels = value.shape
    how = launch("grad_filters", value)
    shared = constants(value, how, terms)
    width = shared["BLOCK_E"] = min(how.channels, shared["BLOCK_E"])
    share = strips(terms.grid, batch * heads * (shared["BLOCK_D"] // width), how, alike=True)
    side = sides(terms)
    space = max(side["SPACE"], 1)
    size = (batch, share.blocks * share.bands, space**2 + side["TIME"], heads, channels)
    found = torch.empty(size, dtype=torch.float32, device=value.device)
    sum_filters[(share.programs,)](
        gradient,
        value,
        video_lengths(terms),
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
        **without(shared, "TEXT", "RELU", "NORM", "DOT", "PRECISION"),
    )
    by_tap = found.sum(dim=(0, 1)).flatten(1)
    return _filter(by_tap[: space**2], terms.conv_space), _filter(by_tap[space**2 :], terms.conv_time)


def taps(terms: Terms) -> list[Tensor | None]:
    """Return the weights of both convolutions in float32, with the taps as the first axis."""
    weights = (terms.conv_space, terms.conv_time)
    return [None if weight is None else weight.float().flatten(1).t().contiguous() for weight in weights]


def sides(terms: Terms) -> dict[str, int]:
    """Return the side length of each convolution in taps; 0 without this convolution."""
    return {
        "SPACE": 0 if terms.conv_space is None else terms.conv_space.shape[-1],
        "TIME": 0 if terms.conv_time is None else terms.conv_time.shape[-1],
    }


def _filter(by_tap: Tensor, weight: Tensor | None) -> Tensor | None:
    """Return gradients (taps, H * D) in the shape of the weight, summed over heads that share the weight."""
    return None if weight is None else by_tap.t().reshape(-1, *weight.shape).sum(dim=0).to(weight.dtype)


def video_lengths(terms: Terms) -> Tensor | None:
    """Return `Terms.key_lengths` counted from the first video token."""
    lengths = contiguous(terms.key_lengths)
    return lengths if lengths is None or terms.text_first == 0 else lengths - terms.text_first


def without(constants: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the constants without the named ones, which a kernel does not have."""
    return {name: value for name, value in constants.items() if name not in names}
