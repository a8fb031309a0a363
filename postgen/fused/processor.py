"""Attention with fused operations, in the compute slot of a module: norm and rotation, then attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from postgen.families.attached import AttachedPlugIn
from postgen.families.attention import AttentionReader, show_attention_call
from postgen.families.attention.dispatch import attend_otherwise, attention_settings
from postgen.families.attention.reading import Stream, dispatched
from postgen.fused.config import FusedOpsConfig
from postgen.kernels.attention.ops import attention
from postgen.kernels.qk_norm_rope import naive
from postgen.kernels.qk_norm_rope.ops import qk_norm_rope


def compute_fused(
    fusion: AttachedPlugIn[FusedOpsConfig],
    reader: AttentionReader,
    inner: Callable[..., Any],
    module: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Return what the processor `inner` returns; it computes where the call wants nothing fused or is not known.

    Args:
        fusion: says which operations are fused in this call.
        reader: of the module's processor.
        inner: the processor.
        module: the attention module.
        args: as the processor takes them.
        kwargs: as the processor takes them.
    """
    now = fusion.now
    config = now.config
    if not now.enabled or not config.in_attention:
        return inner(module, *args, **kwargs)
    call = reader.bind(module, *args, **kwargs)
    reading = reader.read(call)
    if reading is None:
        return inner(module, *args, **kwargs)
    query, key, value = reading.joined(functools.partial(normed_and_rotated, config))
    mask, key_lengths = reading.mask, reading.key_lengths
    del reading  # the memory of what was projected
    out = _attended(config, module, query, key, value, mask, key_lengths)
    return reader.finish(call, out, query.dtype)


def normed_and_rotated(config: FusedOpsConfig, stream: Stream) -> tuple[Tensor, Tensor]:
    """Return queries and keys as attention reads them, in one kernel or as plain torch.

    Args:
        config: says which.
        stream: norms that cannot be left out are called.
    """
    query, key, left = stream.for_one_kernel()
    if not left:
        return query, key
    if config.norm_rope:
        q, k = qk_norm_rope(query, key, **left)
        return q, k
    cos, sin = left.get("cos"), left.get("sin")
    shared = {name: left[name] for name in ("norm", "eps", "first_token") if name in left}
    return (
        naive.norm_rope(query, cos, sin, left["q_weight"], left["q_bias"], **shared),
        naive.norm_rope(key, cos, sin, left["k_weight"], left["k_bias"], **shared),
    )


def _attended(
    config: FusedOpsConfig,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
) -> Tensor:
    """Attention where Enhance-A-Video sees it; a backend or a split among ranks set in diffusers goes first."""
    backend, parallel = attention_settings(module.processor)
    unknown_mask = mask is not None and key_lengths is None
    if config.attention is None or backend is not None or parallel is not None or unknown_mask:
        return dispatched(module, query, key, value, mask)
    show_attention_call(query, key)
    if (out := attend_otherwise(query, key, value, key_lengths)) is not None:
        return out
    chosen = None if config.attention == "auto" else config.attention
    return attention(query, key, value, key_lengths=key_lengths, backend=chosen)
