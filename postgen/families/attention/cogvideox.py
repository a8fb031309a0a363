"""CogVideoX: `CogVideoXAttnProcessor2_0`, also with fused projections.

Text and video attend jointly, with the text tokens first. Norms are per head. The text is not rotated. CogVideoX 1.0
(2B) has no rotation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postgen.families.attention.reading import (
    AttentionCall,
    Norms,
    Reading,
    Stream,
    prepared_mask,
    projected,
    returned,
    rope_of_pairs,
)
from postgen.families.attention.registry import AttentionAnatomy, AttentionReader


def bind(
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> AttentionCall:
    """Return the arguments of the processor by name."""
    return AttentionCall(attention, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def read(call: AttentionCall) -> Reading | None:
    """Return the parts of a joint-attention call; None for a cross-attention module, whose keys are not rotated."""
    attention = call.attention
    if call.encoder_hidden_states is None or attention.is_cross_attention:
        return None
    text = call.encoder_hidden_states.shape[1]
    hidden_states = torch.cat([call.encoder_hidden_states, call.hidden_states], dim=1)
    batch, tokens, _ = hidden_states.shape
    mask = prepared_mask(attention, call.attention_mask, batch, tokens)
    query, key, value = projected(attention, hidden_states)
    rope = None if call.rotary is None else rope_of_pairs(call.rotary, first_token=text)
    stream = Stream(query, key, value, Norms(attention.norm_q, attention.norm_k), rope)
    return Reading(streams=(stream,), text=text, text_first=True, mask=mask)


def read_fused(call: AttentionCall) -> Reading | None:
    """Return the result of `read`; None also for a call with a mask.

    This processor of diffusers prepares the mask for the length of the text only.
    """
    return None if call.attention_mask is not None else read(call)


def finish(call: AttentionCall, out: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the outputs for video and text, (B, N, C) each."""
    assert call.encoder_hidden_states is not None  # `read` returns None without text
    text, out = call.encoder_hidden_states.shape[1], returned(call.attention, out, dtype)
    return out[:, text:], out[:, :text]


ANATOMY = AttentionAnatomy(
    readers={
        "CogVideoXAttnProcessor2_0": AttentionReader(
            bind=bind, read=read, finish=finish, fingerprints=("3099cf1cf662f915",)
        ),
        "FusedCogVideoXAttnProcessor2_0": AttentionReader(
            bind=bind, read=read_fused, finish=finish, fingerprints=("30074dce7fc5ce85",)
        ),
    }
)
