"""Launches of the kernels that walk down the rows of frames: the convolutions, and the gradient of their weights."""

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
    """Say whether there is a convolution."""
    return terms.conv_space is not None or terms.conv_time is not None


def convolve(
    x: Tensor, query: Tensor | None, sums: Sums | None, terms: Terms, table: Tensor | None, out: Tensor
) -> None:
    """Write the convolutions of a video's values and attention of its queries; without queries, transposes of x."""
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
    """Return the gradients of both convolutions' weights, given those of the results."""
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
    """Return the weights of both convolutions tap by tap in float32."""
    weights = (terms.conv_space, terms.conv_time)
    return [None if weight is None else weight.float().flatten(1).t().contiguous() for weight in weights]


def sides(terms: Terms) -> dict[str, int]:
    """Return the taps along a side of each convolution, 0 where there is none."""
    return {
        "SPACE": 0 if terms.conv_space is None else terms.conv_space.shape[-1],
        "TIME": 0 if terms.conv_time is None else terms.conv_time.shape[-1],
    }


def _filter(by_tap: Tensor, weight: Tensor | None) -> Tensor | None:
    """Bring (taps, H * D) to the shape of the weight, adding up heads that share it."""
    return None if weight is None else by_tap.t().reshape(-1, *weight.shape).sum(dim=0).to(weight.dtype)


def video_lengths(terms: Terms) -> Tensor | None:
    """Return `Terms.key_lengths` counted from the video's first token on."""
    lengths = contiguous(terms.key_lengths)
    return lengths if lengths is None or terms.text_first == 0 else lengths - terms.text_first


def without(constants: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return constants that a kernel takes: all but some."""
    return {name: value for name, value in constants.items() if name not in names}
