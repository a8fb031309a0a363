"""Wan: `WanAttnProcessor`. SkyReels-V2: `SkyReelsV2AttnProcessor`.

The video attends to itself. Text and image enter through cross-attention, which is not read. Wan-Animate, VACE and
ChronoEdit use the processor of Wan. Norms are across heads, and all heads have the same rotary angles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postgen.families.attention.reading import AttentionCall, Norms, Reading, Rope, Stream, projected, returned
from postgen.families.attention.registry import AttentionAnatomy, AttentionReader


def bind(
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> AttentionCall:
    """Return the arguments of the processor by name."""
    return AttentionCall(attention, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


def read(call: AttentionCall) -> Reading | None:
    """Return the parts of a self-attention call; None for cross-attention, or without rotary tables."""
    attention, rotary = call.attention, call.rotary
    if call.encoder_hidden_states is not None or attention.is_cross_attention or rotary is None:
        return None
    query, key, value = projected(attention, call.hidden_states)
    cos, sin = rotary  # (1, N, 1, D), with each angle twice
    rope = Rope(cos[..., ::2], sin[..., 1::2], in_float32=False)
    stream = Stream(query, key, value, Norms(attention.norm_q, attention.norm_k, across_heads=True), rope)
    return Reading(streams=(stream,), mask=call.attention_mask)


def finish(call: AttentionCall, out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the output for the video, (B, N, C)."""
    return returned(call.attention, out, dtype)


ANATOMY = AttentionAnatomy(
    readers={
        "SkyReelsV2AttnProcessor": AttentionReader(
            bind=bind, read=read, finish=finish, fingerprints=("5bbff4be70a69844",)
        ),
        "WanAttnProcessor": AttentionReader(bind=bind, read=read, finish=finish, fingerprints=("a2e019b02dcb5331",)),
    }
)
