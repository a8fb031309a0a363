"""Errors of the results and gradients of linear attention, for benchmarks that try other launches of its kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from postgen.kernels.linear_attention import naive
from postgen.kernels.linear_attention.naive import Terms

HEADS = 2
"""The number of heads that are compared; all heads in float64 would not fit into memory."""
ERRORS = {"linear_attention": 4e-3, "linear_attention backward": 6e-3}
"""The largest allowed relative errors of results and gradients in bfloat16, as in the tests on a GPU."""


def outcome(found: Any) -> list[Tensor]:
    """Flatten the result of a pass, which is a tensor or nested tuples of tensors and None, to a list of tensors."""
    if isinstance(found, Tensor):
        return [found]
    return [x for each in found if each is not None for x in outcome(each)]


def relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative L2 difference of the tensors; a difference that is not finite counts as infinity."""
    worst = 0.0
    for x, y in zip(found, expected, strict=True):
        error = float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30))
        worst = max(worst, error if error < float("inf") else float("inf"))
    return worst


def gradients(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, state: Tensor, key_sum: Tensor, terms: Terms
) -> tuple[Tensor, ...]:
    """Return the gradients of normalised queries and keys and of values, computed by the kernels."""
    from postgen.kernels.linear_attention import triton

    found = triton.linear_attention_backward(gradient, None, None, query, key, value, state, key_sum, terms)
    return found.query, found.key, found.value


def worst_errors(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> list[float]:
    """Return the errors of the results and gradients of the first heads against float64, in the order of `ERRORS`."""
    from postgen.kernels.linear_attention import triton

    gradient = torch.randn(query.shape, device=query.device).to(query.dtype)
    out, state, key_sum = triton.linear_attention(query, key, value, terms)
    found = gradients(gradient, query, key, value, state, key_sum, terms)
    few = few_heads(terms, query.shape[2], query.shape[3])
    doubled = [x[:, :, :HEADS].double() for x in (query, key, value)]
    expected, *sums = naive.linear_attention(*doubled, few)
    exact = naive.linear_attention_backward(gradient[:, :, :HEADS].double(), None, None, *doubled, *sums, few)
    of_results = relative([out[:, :, :HEADS]], [expected])
    of_gradients = relative(_first(found), (exact.query, exact.key, exact.value))
    return [of_results, of_gradients]


def few_heads(terms: Terms, heads: int, channels: int) -> Terms:
    """Return the terms of the first heads in float64; weights for the channels of all heads are cut."""
    given = {each.name: getattr(terms, each.name) for each in fields(terms)}
    tensors = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
    cut = {name: x[: HEADS * channels] if len(x) == heads * channels else x for name, x in tensors.items()}
    return replace(terms, **{name: x.double() for name, x in cut.items()})


def _first(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [x[:, :, :HEADS] for x in tensors]
