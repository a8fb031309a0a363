"""Linear attention with Triton kernels, in two passes: the first reads keys and values, the second reads queries and
writes results.

This file launches the kernels. `triton_launch.py` divides the tokens among programs. The kernels are in
`triton_forward.py` and `triton_backward.py`, and in `triton_convolution.py` for a second pass with a convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.kernels.dispatch import launching_on
from postgen.kernels.linear_attention.naive import Gradients, Terms, by_kind
from postgen.kernels.linear_attention.triton_backward import grad_keys, grad_queries
from postgen.kernels.linear_attention.triton_descriptors import described
from postgen.kernels.linear_attention.triton_forward import read_state, sum_keys
from postgen.kernels.linear_attention.triton_launch import block_d, constants, dot_type, launch, parts_of, splits
from postgen.kernels.linear_attention.triton_rope import rope_rows
from postgen.kernels.linear_attention.triton_strips import convolve, convolves, grad_filters
from postgen.kernels.linear_attention.triton_sums import Sums, contiguous, head_stride, join, partial_sums, rstd


def linear_attention(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `naive.linear_attention`; `ops.py` has checked the shapes. Tensors with any strides are not copied."""
    with launching_on(query):
        table = rope_rows(terms, query, block_d(query.shape[-1]))
        sums = _sum_keys(key, value, terms, table)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if convolves(terms):
            _convolve(value, query, sums, terms, table, out)
        else:
            _read_state(query, sums, terms, table, out)
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
    """Compute `naive.linear_attention_backward`. With a norm, the gradients of queries and keys are float32."""
    with launching_on(query):
        table = rope_rows(terms, query, block_d(query.shape[-1]))
        of_query, scales = _of_queries(gradient, query, Sums(state, key_sum), terms, table)
        sums = _sums_of_queries(gradient, query, scales, (of_state, of_key_sum), terms, table)
        of_key, of_value = _grad_keys(gradient, key, value, sums, terms, table)
        of_space, of_time = grad_filters(gradient, value, terms)
    return Gradients(
        query=of_query,
        key=of_key,
        value=of_value,
        conv_space=of_space,
        conv_time=of_time,
        state=sums.matrix,
        key_sum=sums.vector,
    )


def _sum_keys(key: Tensor, value: Tensor, terms: Terms, table: Tensor | None) -> Sums:
    found = _sums(key, value, terms.key_weight, contiguous(terms.key_lengths), None, "keys", terms, table)
    return join(found, terms.state, terms.key_sum, dot=dot_type(key))


def _sums(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    lengths: Tensor | None,
    scales: tuple[Tensor, Tensor] | None,
    name: str,
    terms: Terms,
    table: Tensor | None,
) -> Sums:
    """Return the sums of R x y^T and of x for each split of the tokens.

    `scales` are None, or a scale of y and a weight of x for each token, (B, H, N) each.
    """
    batch, tokens, heads, channels = x.shape
    how = launch(name if table is None else f"turned_{name}", x)
    parts, tiles = splits(tokens, heads, how)
    found = partial_sums(x, parts)
    # Tokens beyond `lengths` must not be read (they may be NaN), which a descriptor cannot mask.
    (x_tiles, y_tiles), how = ([x, y], how.by_threads) if lengths is not None else described(how, x, y)
    sum_keys[(heads * parts_of(channels), parts, batch)](
        x_tiles,
        y_tiles,
        rstd(x, terms),
        contiguous(weight),
        table,
        lengths,
        *(scales or (None, None)),
        found.matrix,
        found.vector,
        *x.stride(),
        *y.stride(),
        head_stride(weight, channels),
        terms.text_first,
        tokens,
        tiles,
        terms.norm_eps,
        WHOLE=how.described,
        **constants(x, how, terms),
    )
    return found


def _read_state(query: Tensor, sums: Sums, terms: Terms, table: Tensor | None, out: Tensor) -> None:
    """Write the attention of queries to `out`. Only the sample stride of `out` may differ from a contiguous tensor."""
    batch, tokens, heads, channels = query.shape
    how = launch("queries" if table is None else "turned_queries", query)
    parts, tiles = splits(tokens, heads, how)
    (questions, answers), how = described(how, query, out)
    read_state[(heads * parts_of(channels), parts, batch)](
        questions,
        rstd(query, terms),
        contiguous(terms.query_weight),
        table,
        sums.terms,
        sums.vector,
        answers,
        *query.stride(),
        out.stride(0),
        head_stride(terms.query_weight, channels),
        terms.text_first,
        tokens,
        tiles,
        terms.norm_eps,
        terms.eps,
        WHOLE=how.described,
        **constants(query, how, terms),
    )


def _convolve(
    x: Tensor, query: Tensor | None, sums: Sums | None, terms: Terms, table: Tensor | None, out: Tensor
) -> None:
    """Write to `out` the convolutions of x plus the attention of the queries.

    Without queries, write the transposed convolutions of x, which the backward pass needs. Text tokens have no
    convolution.
    """
    for text in (slice(0, terms.text_first), slice(x.shape[1] - terms.text_last, x.shape[1])):
        if text.start < text.stop and query is None:
            out[:, text] = 0
        elif text.start < text.stop and query is not None and sums is not None:
            _read_state(query[:, text], sums, terms, None, out[:, text])
    asking = None if query is None else by_kind(query, terms)[1]
    convolve(by_kind(x, terms)[1], asking, sums, terms, table, by_kind(out, terms)[1])


def _of_queries(
    gradient: Tensor, query: Tensor, given: Sums, terms: Terms, table: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the gradients of the queries, and for each query the scale and weight for `_sums_of_queries`."""
    batch, tokens, heads, channels = query.shape
    of_query = _new_gradient(query, terms)
    how = launch("grad_queries" if table is None else "turned_grad_queries", query)
    parts, tiles = splits(tokens, heads, how)
    scales = torch.empty(batch, heads, tokens, dtype=torch.float32, device=query.device)
    shares = scales.new_empty(parts_of(channels), batch, heads, tokens)
    # Split the saved sums into the 16-bit terms of the matrix products.
    sums = join(
        Sums(given.matrix[:, :, None].contiguous(), given.vector[:, :, None].contiguous()), dot=dot_type(query)
    )

    def go(found: Tensor | None, written: Tensor | None) -> None:
        # `found` are the summed weights of a second launch, `written` is the gradient to write; None skips either.
        asked = [gradient, query] if written is None else [gradient, query, written]
        tiles_of, run = described(how, *asked)
        grad_queries[(heads * parts_of(channels), parts, batch)](
            *tiles_of[:2],
            rstd(query, terms),
            contiguous(terms.query_weight),
            table,
            sums.terms,
            sums.vector,
            found,
            None if written is None else tiles_of[2],
            scales,
            shares,
            *gradient.stride(),
            *query.stride(),
            head_stride(terms.query_weight, channels),
            terms.text_first,
            tokens,
            tiles,
            terms.norm_eps,
            terms.eps,
            WHOLE=run.described,
            CHAINED=run.described and run.rows_for_all_warps,
            **constants(query, run, terms),
        )

    # If several programs share a head, a first launch computes the shares of the weights, a second one uses their sum.
    go(None, of_query if len(shares) == 1 else None)
    weights = shares[0]
    if len(shares) > 1:
        weights = shares.sum(dim=0)
        go(weights, of_query)
    return of_query, (scales, weights)


def _sums_of_queries(
    gradient: Tensor,
    query: Tensor,
    scales: tuple[Tensor, Tensor],
    first: tuple[Tensor | None, Tensor | None],
    terms: Terms,
    table: Tensor | None,
) -> Sums:
    """Return the gradients of S and k', including the gradients of the returned sums (`first`)."""
    return join(_sums(query, gradient, terms.query_weight, None, scales, "grad_sums", terms, table), *first)


def _grad_keys(
    gradient: Tensor, key: Tensor, value: Tensor, sums: Sums, terms: Terms, table: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, channels = key.shape
    of_key = _new_gradient(key, terms)
    of_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if convolves(terms):
        _convolve(gradient, None, None, terms, None, of_value)
    how = launch("grad_keys" if table is None else "turned_grad_keys", key)
    parts, tiles = splits(tokens, heads, how)
    # Descriptors do not work here with `key_lengths`, because tokens beyond them must not be read, nor with a
    # convolution, because its part of the gradient of the values is read back.
    plain = terms.key_lengths is not None or convolves(terms)
    tensors = [key, value, of_key, of_value]
    given, how = (tensors, how.by_threads) if plain else described(how, *tensors)
    grad_keys[(heads * parts_of(channels), parts, batch)](
        *given[:2],
        rstd(key, terms),
        contiguous(terms.key_weight),
        table,
        contiguous(terms.key_lengths),
        sums.matrix,
        sums.vector,
        *given[2:],
        *key.stride(),
        *value.stride(),
        head_stride(terms.key_weight, channels),
        terms.text_first,
        tokens,
        tiles,
        terms.norm_eps,
        ADDS=convolves(terms),
        WHOLE=how.described,
        CHAINED=how.described and how.rows_for_all_warps,
        **constants(key, how, terms),
    )
    return of_key, of_value


def _new_gradient(x: Tensor, terms: Terms) -> Tensor:
    """Return an empty tensor for a gradient, in float32 if the gradient of a norm follows."""
    return torch.empty(x.shape, dtype=x.dtype if terms.qk_norm is None else torch.float32, device=x.device)
