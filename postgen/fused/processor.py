"""The attention of a module with fused operations: norm and rotary embedding, then attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from postgen.families.attention import AttentionReader, show_attention_call
from postgen.families.attention.dispatch import attend_otherwise, attention_settings
from postgen.families.attention.reading import Stream, dispatched
from postgen.fused.config import FusedOpsConfig
from postgen.kernels.attention.backends import last_backend
from postgen.kernels.attention.ops import attention
from postgen.kernels.qk_norm_rope import naive
from postgen.kernels.qk_norm_rope.ops import qk_norm_rope

if TYPE_CHECKING:
    from postgen.fused.state import Fusion


def compute_fused(
    fusion: Fusion,
    reader: AttentionReader,
    inner: Callable[..., Any],
    module: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Compute the attention of a module, with the same result as its attention processor `inner`.

    The processor itself runs where this call fuses nothing, or where the reader does not know this kind of call.

    Args:
        fusion: the plug-in, which holds the settings of the current call and remembers the kernel for its summary.
        reader: reads queries, keys and values of the module's processor.
        inner: the attention processor.
        module: the attention module.
        args: positional arguments of the processor.
        kwargs: keyword arguments of the processor.

    Returns:
        The return value of the processor.
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
    del reading  # frees the memory of the projections
    out, kernel = _attended(config, module, query, key, value, mask, key_lengths)
    if not torch.compiler.is_compiling():
        fusion.kernel = kernel
    return reader.finish(call, out, query.dtype)


def normed_and_rotated(config: FusedOpsConfig, stream: Stream) -> tuple[Tensor, Tensor]:
    """Return queries and keys after norm and rotary embedding, (B, N, H, D).

    Args:
        config: `norm_rope` selects the fused kernel; without it the same formulas run in plain torch.
        stream: raw queries and keys with their norms. A norm that has hooks is called as a module.
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
) -> tuple[Tensor, str | None]:
    """Compute attention with the configured kernel, and show the call to plug-ins such as Enhance-A-Video.

    diffusers' dispatcher computes instead where the user set an attention backend or context parallelism in diffusers,
    or where the mask is not one of key lengths.

    Returns:
        The output, and the name of the kernel that computed it; None if FP8 attention did, which has its own summary.
    """
    backend, parallel = attention_settings(module.processor)
    unknown_mask = mask is not None and key_lengths is None
    if config.attention is None or backend is not None or parallel is not None or unknown_mask:
        return dispatched(module, query, key, value, mask), "attention of diffusers"
    show_attention_call(query, key)
    if (out := attend_otherwise(query, key, value, key_lengths)) is not None:
        return out, None
    chosen = None if config.attention == "auto" else config.attention
    return attention(query, key, value, key_lengths=key_lengths, backend=chosen), last_backend()
