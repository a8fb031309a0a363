"""LTX: `LTXVideoAttnProcessor`.

The video attends to itself. The text enters through cross-attention, which is not read. Norms are across heads, and
every head has rotary angles of its own. The processor does not use fused projections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.families.attention.reading import (
    AttentionCall,
    Norms,
    Reading,
    Rope,
    Stream,
    bind,
    projected_by,
    returned,
)
from postgen.families.attention.registry import AttentionAnatomy, AttentionReader


def read(call: AttentionCall) -> Reading | None:
    """Return the parts of a self-attention call; None for cross-attention, with a mask, or without rotary tables."""
    if call.encoder_hidden_states is not None or call.attention_mask is not None or call.rotary is None:
        return None
    attention = call.attention
    layers = attention.to_q, attention.to_k, attention.to_v
    query, key, value = projected_by(attention, layers, call.hidden_states)
    # The tables are (B, N, H * D), with each angle twice.
    cos, sin = (table.unflatten(-1, (attention.heads, -1))[..., ::2] for table in call.rotary)
    stream = Stream(query, key, value, Norms(attention.norm_q, attention.norm_k, across_heads=True), Rope(cos, sin))
    return Reading(streams=(stream,))


def finish(call: AttentionCall, out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the output for the video, (B, N, C)."""
    return returned(call.attention, out, dtype)


ANATOMY = AttentionAnatomy(
    readers={
        "LTXVideoAttnProcessor": AttentionReader(
            bind=bind, read=read, finish=finish, fingerprints=("a0f89447f54311c2",)
        )
    }
)
