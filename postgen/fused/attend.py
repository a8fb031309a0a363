"""What the fused attention processors of all families share: norm and rotation, then attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from postgen.compat import show_attention_call
from postgen.fused.config import FusedOpsConfig
from postgen.fused.norms import affine, plain
from postgen.kernels.attention.ops import attention as routed_attention
from postgen.kernels.qk_norm_rope import naive
from postgen.kernels.qk_norm_rope.ops import qk_norm_rope

Tables = tuple[Tensor, Tensor]
"""Cosines and sines, (1 or B, R, 1 or H, D / 2)."""


def normed_and_rotated(
    config: FusedOpsConfig,
    query: Tensor,
    key: Tensor,
    norms: tuple[Any, Any],
    tables: Tables | None = None,
    *,
    across_heads: bool = False,
    first_token: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return queries and keys as attention reads them, in one kernel or as plain torch.

    Args:
        config: says which.
        query: (B, N, H, D).
        key: as `query`.
        norms: modules of the queries and of the keys; None is no norm. Those that cannot be left out are called.
        tables: None rotates nothing.
        across_heads: the norms are those of all heads of a token.
        first_token: the first token that is rotated.
    """
    options = _norm_options(*norms, across_heads)
    if options is None:
        query, key = (_called(norm, x, across_heads) for norm, x in zip(norms, (query, key), strict=True))
        options = {"norm": "none"}
    if tables is None and options["norm"] == "none":
        return query, key
    cos, sin = (None, None) if tables is None else tables
    if config.norm_rope:
        q, k = qk_norm_rope(query, key, cos=cos, sin=sin, **options, first_token=first_token)
        return q, k
    shared: dict[str, Any] = {name: options[name] for name in ("norm", "eps") if name in options}
    weights = [[options.get(f"{name}_{part}") for part in ("weight", "bias")] for name in "qk"]
    q, k = (
        naive.norm_rope(x, cos, sin, *own, first_token=first_token, **shared)
        for x, own in zip((query, key), weights, strict=True)
    )
    return q, k


def _norm_options(query_norm: Any, key_norm: Any, across_heads: bool) -> dict[str, Any] | None:
    """Return the arguments of `qk_norm_rope` that say what two modules compute; None: they must be called."""
    if query_norm is None and key_norm is None:
        return {"norm": "none"}
    if query_norm is None or key_norm is None or not plain(query_norm, key_norm):
        return None
    kind = type(query_norm).__name__
    if kind != type(key_norm).__name__ or query_norm.eps is None or query_norm.eps != key_norm.eps:
        return None
    if kind not in ("RMSNorm", "LayerNorm") or (across_heads and kind != "RMSNorm"):
        return None
    norm = "layer_norm" if kind == "LayerNorm" else "rms_norm_across_heads" if across_heads else "rms_norm"
    of_query, of_key = affine(query_norm), affine(key_norm)
    weights = {"q_weight": of_query["weight"], "k_weight": of_key["weight"]}
    return {"norm": norm, "eps": query_norm.eps, **weights, "q_bias": of_query["bias"], "k_bias": of_key["bias"]}


def _called(norm: Any, x: Tensor, across_heads: bool) -> Tensor:
    if norm is None:
        return x
    out: Tensor = norm(x.flatten(2)).view_as(x) if across_heads else norm(x)
    return out


def attend(
    config: FusedOpsConfig,
    processor: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Return the attention of (B, N, H, D) tensors, where Enhance-A-Video sees it.

    Args:
        config: says who computes it.
        processor: of diffusers; a backend or a split among ranks that was set on it goes first.
        query: normed and rotated.
        key: normed and rotated.
        value: as projected.
        mask: for diffusers' dispatcher.
        key_lengths: (B,), the same as `mask` where that is none but a number of first keys.
    """
    backend, parallel = (getattr(processor, name, None) for name in ("_attention_backend", "_parallel_config"))
    unknown_mask = mask is not None and key_lengths is None
    if config.attention is None or backend is not None or parallel is not None or unknown_mask:
        out: Tensor = dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=backend, parallel_config=parallel
        )
        return out
    show_attention_call(query, key)
    chosen = None if config.attention == "auto" else config.attention
    return routed_attention(query, key, value, key_lengths=key_lengths, backend=chosen)


def projected(attention: Any, hidden_states: Tensor) -> list[Tensor]:
    """Return queries, keys and values (B, N, H, D) of self-attention, fused QKV projections included, as views."""
    if getattr(attention, "fused_projections", False):
        parts = list(attention.to_qkv(hidden_states).chunk(3, dim=-1))
    else:
        parts = [project(hidden_states) for project in (attention.to_q, attention.to_k, attention.to_v)]
    return [part.unflatten(2, (attention.heads, -1)) for part in parts]


def returned(attention: Any, out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what attention found, (B, N, H, D), through its last projection, (B, N, C)."""
    out = out.flatten(2, 3).to(dtype)
    for layer in attention.to_out:
        out = layer(out)
    return out


def of_pairs(tables: Tables) -> Tables:
    """Return views of the angles (R, D) that diffusers writes twice in a row, as (1, R, 1, D / 2)."""
    cos, sin = (table[None, :, None, ::2] for table in tables)
    return cos, sin
